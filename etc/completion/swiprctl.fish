# Completion of swiprctl in fish.
# Made by tools/make_completions.py from the parsers: run that, change nothing here.

# Whether what is completed stands at this place.
function __swiprctl_at
    set -l one :--socket :--timeout :--compute compute:--socket compute:--timeout \
        compute:--files-from compute:--format report:--socket report:--timeout report:--files-from \
        report:-o report:--output ping:--socket ping:--timeout status:--socket status:--timeout \
        reload:--socket reload:--timeout
    set -l many compute:1 report:1
    set -l early -h --help --socket --timeout
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
function __swiprctl_folders
    __fish_complete_directories (string replace -r '^--[^=]*=' '' -- (commandline -ct))
end

complete -c swiprctl -f
complete -c swiprctl -n '__swiprctl_at :0' -fa compute -d 'print the scores of images, as in 0.66,0.33'
complete -c swiprctl -n '__swiprctl_at :0' -fa report -d 'write a page that shows images, sorted by score'
complete -c swiprctl -n '__swiprctl_at :0' -fa ping -d 'print pong when the daemon answers'
complete -c swiprctl -n '__swiprctl_at :0' -fa status -d 'print what the daemon is doing'
complete -c swiprctl -n '__swiprctl_at :0' -fa reload -d 'let the daemon read its settings and model again'
complete -c swiprctl -n '__swiprctl_at :-' -s h -l help -d 'show this help message and exit'
complete -c swiprctl -n '__swiprctl_at :-' -l version -d 'show program\'s version number and exit'
complete -c swiprctl -n '__swiprctl_at :-' -l socket -r -F -d 'the daemon\'s socket'
complete -c swiprctl -n '__swiprctl_at :-' -l timeout -r -f -d 'how long to wait for the next answer'
complete -c swiprctl -n '__swiprctl_at :-' -l compute -r -F -d 'speak like the script that swipr replaces'
complete -c swiprctl -n '__swiprctl_at compute:-' -s h -l help -d 'show this help message and exit'
complete -c swiprctl -n '__swiprctl_at compute:-' -l socket -r -F -d 'the daemon\'s socket'
complete -c swiprctl -n '__swiprctl_at compute:-' -l timeout -r -f -d 'how long to wait for the next answer'
complete -c swiprctl -n '__swiprctl_at compute:-' -l files-from -r -F -d 'take more paths from FILE, one a line'
complete -c swiprctl -n '__swiprctl_at compute:-' -s 0 -l null -d 'in FILE, paths end with NUL, not with a newline'
complete -c swiprctl -n '__swiprctl_at compute:-' -s r -l recursive -d 'take the images in folders and below'
complete -c swiprctl -n '__swiprctl_at compute:-' -l format -r -fa 'tuple csv json ndjson' -d 'how to print'
complete -c swiprctl -n '__swiprctl_at compute:-' -l labels -d 'print the label before each score, as in NO=0.66'
complete -c swiprctl -n '__swiprctl_at compute:-' -l top -d 'print only the label with the highest score, and that'
complete -c swiprctl -n '__swiprctl_at report:-' -s h -l help -d 'show this help message and exit'
complete -c swiprctl -n '__swiprctl_at report:-' -l socket -r -F -d 'the daemon\'s socket'
complete -c swiprctl -n '__swiprctl_at report:-' -l timeout -r -f -d 'how long to wait for the next answer'
complete -c swiprctl -n '__swiprctl_at report:-' -l files-from -r -F -d 'take more paths from FILE, one a line'
complete -c swiprctl -n '__swiprctl_at report:-' -s 0 -l null -d 'in FILE, paths end with NUL, not with a newline'
complete -c swiprctl -n '__swiprctl_at report:-' -s r -l recursive -d 'as for compute'
complete -c swiprctl -n '__swiprctl_at report:-' -s o -l output -r -F -d 'the page to write, as report.html'
complete -c swiprctl -n '__swiprctl_at ping:-' -s h -l help -d 'show this help message and exit'
complete -c swiprctl -n '__swiprctl_at ping:-' -l socket -r -F -d 'the daemon\'s socket'
complete -c swiprctl -n '__swiprctl_at ping:-' -l timeout -r -f -d 'how long to wait for the next answer'
complete -c swiprctl -n '__swiprctl_at status:-' -s h -l help -d 'show this help message and exit'
complete -c swiprctl -n '__swiprctl_at status:-' -l socket -r -F -d 'the daemon\'s socket'
complete -c swiprctl -n '__swiprctl_at status:-' -l timeout -r -f -d 'how long to wait for the next answer'
complete -c swiprctl -n '__swiprctl_at status:-' -l json -d 'print it as one line of JSON'
complete -c swiprctl -n '__swiprctl_at status:-' -l prometheus -d 'print it as metrics for Prometheus'
complete -c swiprctl -n '__swiprctl_at status:-' -l watch -f -d 'print it again and again, every SECONDS'
complete -c swiprctl -n '__swiprctl_at reload:-' -s h -l help -d 'show this help message and exit'
complete -c swiprctl -n '__swiprctl_at reload:-' -l socket -r -F -d 'the daemon\'s socket'
complete -c swiprctl -n '__swiprctl_at reload:-' -l timeout -r -f -d 'how long to wait for the next answer'
complete -c swiprctl -n '__swiprctl_at compute:1' -F -d 'an image file'
complete -c swiprctl -n '__swiprctl_at report:1' -F -d 'an image file, or a folder'
