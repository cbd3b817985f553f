# Completion of swiprd in fish.
# Made by tools/make_completions.py from the parsers: run that, change nothing here.

# Whether what is completed stands at this place.
function __swiprd_at
    set -l one :--config :--pid-file :--log-file :--model :--precision :--cache-dir :--socket \
        :--workers :--threads :--idle-timeout :--compute-timeout :--load-timeout :--drain-timeout \
        :--line-timeout :--reply-timeout :--max-connections :--max-per-user :--max-in-flight \
        :--max-line-bytes :--max-depth :--max-queue :--max-file-mib :--max-megapixels \
        :--max-worker-mib :--recycle-mib :--admin-users :--log-level import:-o import:--output \
        import:--labels import:--activation import:--arch import:--license import:--size \
        import:--short-side import:--fit import:--resample import:--orientation import:--mean \
        import:--std import:--jpeg-margin compile:--precision compile:--config compile:--cache-dir \
        compile:--threads show:--config show:--cache-dir show:--threads verify:--config \
        verify:--cache-dir verify:--threads
    set -l many import:--check compile:2
    set -l early
    set -l command ''
    set -l place 0
    set -l value ''
    set -l ended ''
    for word in (commandline -opc)[2..]
        if test -n "$value"; and not string match -qr -- '^-.' $word
            or contains -- $command:$value $one
            contains -- $command:$value $many; or set value ''
        else if test -z "$ended"; and string match -qr -- '^-.' $word
            set value ''
            contains -- $command:$word $one $many; and set value $word
            if test $word = --
                set ended yes
            else if test -z "$command"; and not contains -- (string split = -- $word)[1] $early
                set place 1
            end
        else if test $place = 0
            set command $word
            set place 1
        else if not contains -- $command:$place $many
            set place (math $place + 1)
        end
    end
    test -z "$value"; or set place $value
    contains -- $argv $command:- $command:$place
end

# Of --option=VALUE, what looks for folders wants the value.
function __swiprd_folders
    __fish_complete_directories (string replace -r '^--[^=]*=' '' -- (commandline -ct))
end

complete -c swiprd -f
complete -c swiprd -n '__swiprd_at :0' -fa import -d 'make a bundle of a checkpoint of fast.ai 0.7, 1, 2 or torchvision'
complete -c swiprd -n '__swiprd_at :0' -fa compile -d 'compile a bundle for this machine'
complete -c swiprd -n '__swiprd_at :0' -fa show -d 'print what a bundle holds'
complete -c swiprd -n '__swiprd_at :0' -fa verify -d 'check that this machine gives the golden answers'
complete -c swiprd -n '__swiprd_at :-' -s h -l help -d 'show this help message and exit'
complete -c swiprd -n '__swiprd_at :-' -l version -d 'show program\'s version number and exit'
complete -c swiprd -n '__swiprd_at :-' -l config -r -F -d 'settings file'
complete -c swiprd -n '__swiprd_at :-' -l detach -d 'go on in the background'
complete -c swiprd -n '__swiprd_at :-' -l pid-file -r -F -d 'its process id, with --detach'
complete -c swiprd -n '__swiprd_at :-' -l log-file -r -F -d 'where to log, with --detach'
complete -c swiprd -n '__swiprd_at :-' -l model -r -F -d 'model to serve'
complete -c swiprd -n '__swiprd_at :-' -l precision -r -fa 'auto fp32 bf16' -d 'compiled form to serve'
complete -c swiprd -n '__swiprd_at :-' -l cache-dir -r -fa '(__swiprd_folders)' -d 'where compiled forms are'
complete -c swiprd -n '__swiprd_at :-' -l socket -r -F -d 'where to listen when systemd does not'
complete -c swiprd -n '__swiprd_at :-' -l workers -r -f -d 'worker processes'
complete -c swiprd -n '__swiprd_at :-' -l threads -r -f -d 'threads per worker'
complete -c swiprd -n '__swiprd_at :-' -l idle-timeout -r -f -d 'free the memory after S idle seconds'
complete -c swiprd -n '__swiprd_at :-' -l compute-timeout -r -f -d 'seconds for one image'
complete -c swiprd -n '__swiprd_at :-' -l load-timeout -r -f -d 'seconds to load the model'
complete -c swiprd -n '__swiprd_at :-' -l drain-timeout -r -f -d 'seconds to finish when stopped'
complete -c swiprd -n '__swiprd_at :-' -l line-timeout -r -f -d 'seconds for a client to finish a request'
complete -c swiprd -n '__swiprd_at :-' -l reply-timeout -r -f -d 'seconds for a client to take a reply'
complete -c swiprd -n '__swiprd_at :-' -l max-connections -r -f -d 'clients at a time'
complete -c swiprd -n '__swiprd_at :-' -l max-per-user -r -f -d 'clients of one user'
complete -c swiprd -n '__swiprd_at :-' -l max-in-flight -r -f -d 'requests of a connection at a time'
complete -c swiprd -n '__swiprd_at :-' -l max-line-bytes -r -f -d 'longest request, bytes'
complete -c swiprd -n '__swiprd_at :-' -l max-depth -r -f -d 'deepest nesting of a request'
complete -c swiprd -n '__swiprd_at :-' -l max-queue -r -f -d 'images waiting before \'busy\''
complete -c swiprd -n '__swiprd_at :-' -l max-file-mib -r -f -d 'largest image file, MiB'
complete -c swiprd -n '__swiprd_at :-' -l max-megapixels -r -f -d 'largest image, megapixels'
complete -c swiprd -n '__swiprd_at :-' -l max-worker-mib -r -f -d 'address space of a worker, MiB'
complete -c swiprd -n '__swiprd_at :-' -l recycle-mib -r -f -d 'MiB a worker may gain'
complete -c swiprd -n '__swiprd_at :-' -l admin-users -r -f -d 'who else may reload, as in alice,bob'
complete -c swiprd -n '__swiprd_at :-' -l log-level -r -fa 'debug info warning error' -d 'what to log'
complete -c swiprd -n '__swiprd_at import:-' -s h -l help -d 'show this help message and exit'
complete -c swiprd -n '__swiprd_at import:-' -s o -l output -r -F -d 'file to write'
complete -c swiprd -n '__swiprd_at import:-' -l check -r -F -d 'print the new bundle\'s scores'
complete -c swiprd -n '__swiprd_at import:-' -l labels -r -f -d 'names of the scores, in the order of the classes'
complete -c swiprd -n '__swiprd_at import:-' -l activation -r -fa 'softmax sigmoid none' -d 'what makes scores of outputs'
complete -c swiprd -n '__swiprd_at import:-' -l arch -r -f -d 'architecture'
complete -c swiprd -n '__swiprd_at import:-' -l license -r -f -d 'SPDX identifier of the weights\' licence'
complete -c swiprd -n '__swiprd_at import:-' -l size -r -f -d 'side of the input in pixels'
complete -c swiprd -n '__swiprd_at import:-' -l short-side -r -f -d 'scale to this before cropping to --size'
complete -c swiprd -n '__swiprd_at import:-' -l fit -r -fa 'short_side square squish' -d 'scale until the shorter side fits, or the middle square, or squish'
complete -c swiprd -n '__swiprd_at import:-' -l resample -r -fa 'area linear grid nearest box bilinear hamming bicubic lanczos' -d 'area, linear, grid, nearest, box, bilinear, hamming, bicubic, lanczos'
complete -c swiprd -n '__swiprd_at import:-' -l orientation -r -fa 'apply jpeg ignore' -d 'whether EXIF turns pictures'
complete -c swiprd -n '__swiprd_at import:-' -l mean -r -f -d 'of values from 0 to 1'
complete -c swiprd -n '__swiprd_at import:-' -l std -r -f -d 'of values from 0 to 1'
complete -c swiprd -n '__swiprd_at import:-' -l jpeg-margin -r -f -d 'let large JPEGs be decoded smaller, down to X times the shorter side'
complete -c swiprd -n '__swiprd_at compile:-' -s h -l help -d 'show this help message and exit'
complete -c swiprd -n '__swiprd_at compile:-' -l precision -r -fa 'fp32 bf16' -d 'bf16 is faster where the processor has it'
complete -c swiprd -n '__swiprd_at compile:-' -l config -r -F -d 'settings file'
complete -c swiprd -n '__swiprd_at compile:-' -l cache-dir -r -fa '(__swiprd_folders)' -d 'where compiled forms are'
complete -c swiprd -n '__swiprd_at compile:-' -l threads -r -f -d 'threads of a worker'
complete -c swiprd -n '__swiprd_at show:-' -s h -l help -d 'show this help message and exit'
complete -c swiprd -n '__swiprd_at show:-' -l json -d 'print one JSON object'
complete -c swiprd -n '__swiprd_at show:-' -l config -r -F -d 'settings file'
complete -c swiprd -n '__swiprd_at show:-' -l cache-dir -r -fa '(__swiprd_folders)' -d 'where compiled forms are'
complete -c swiprd -n '__swiprd_at show:-' -l threads -r -f -d 'threads of a worker'
complete -c swiprd -n '__swiprd_at verify:-' -s h -l help -d 'show this help message and exit'
complete -c swiprd -n '__swiprd_at verify:-' -l config -r -F -d 'settings file'
complete -c swiprd -n '__swiprd_at verify:-' -l cache-dir -r -fa '(__swiprd_folders)' -d 'where compiled forms are'
complete -c swiprd -n '__swiprd_at verify:-' -l threads -r -f -d 'threads of a worker'
complete -c swiprd -n '__swiprd_at import:1' -F -d 'the checkpoint'
complete -c swiprd -n '__swiprd_at import:--check' -F -d 'print the new bundle\'s scores'
complete -c swiprd -n '__swiprd_at compile:1' -F
complete -c swiprd -n '__swiprd_at compile:2' -F -d 'more pictures whose scores must not drift'
complete -c swiprd -n '__swiprd_at show:1' -F
complete -c swiprd -n '__swiprd_at verify:1' -F
