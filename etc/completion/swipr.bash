# Completion of swiprctl and swiprd in bash, with or without bash-completion.
# Made by tools/make_completions.py from the parsers: run that, change nothing here.

# Set cur to the beginning of what is completed, and at to its place. The caller has early, the
# options that a command may follow, and takes, how many words stand at a place: one or many.
_swipr_look() {
    local command='' place=0 value='' ended='' last='' word
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ $word == = && $last == -?* ]]; then
            value=$last # readline makes three words of --option=VALUE
        elif [[ $value && $word != -?* || ${takes[$command:$value]-} == one ]]; then
            [[ ${takes[$command:$value]-} == many ]] || value=''
        elif [[ $word == -?* && ! $ended ]]; then
            value=${takes[$command:$word]+$word}
            if [[ $word == -- ]]; then
                ended=1
            elif [[ ! $command && " $early " != *" ${word%%=*} "* ]]; then
                place=1
            fi
        elif ((place == 0)); then
            command=$word place=1
        elif [[ ${takes[$command:$place]-} != many ]]; then
            ((place += 1))
        fi
        last=$word
    done
    cur=${COMP_WORDS[COMP_CWORD]}
    [[ $cur != = || $last != -?* ]] || cur='' value=$last
    at=$command:${value:-$place}
    [[ $cur != -* || $ended || $last == = || ${takes[$at]-} == one ]] || at=$command:-
}

_swipr_words() {
    local IFS=$' \t\n'
    mapfile -t COMPREPLY < <(compgen -W "$*" -- "$cur")
}

# $1 is -f for files and folders, -d for folders alone.
_swipr_files() {
    compopt -o filenames 2>/dev/null # so that readline quotes them, and adds / to folders
    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}

_swiprctl() {
    local cur at early='-h --help --socket --timeout'
    local -A takes=([:--socket]=one [:--timeout]=one [:--compute]=one [compute:--socket]=one \
        [compute:--timeout]=one [compute:--files-from]=one [compute:--format]=one \
        [report:--socket]=one [report:--timeout]=one [report:--files-from]=one [report:-o]=one \
        [report:--output]=one [ping:--socket]=one [ping:--timeout]=one [status:--socket]=one \
        [status:--timeout]=one [reload:--socket]=one [reload:--timeout]=one [compute:1]=many \
        [report:1]=many)
    COMPREPLY=()
    _swipr_look
    case $at in
    :0)
        _swipr_words compute report ping status reload ;;
    :-)
        _swipr_words -h --help --version --socket --timeout --compute ;;
    compute:-)
        _swipr_words -h --help --socket --timeout --files-from -0 --null -r --recursive --format \
        --labels --top ;;
    report:-)
        _swipr_words -h --help --socket --timeout --files-from -0 --null -r --recursive -o \
        --output ;;
    ping:- | reload:-)
        _swipr_words -h --help --socket --timeout ;;
    status:-)
        _swipr_words -h --help --socket --timeout --json --prometheus --watch ;;
    :--socket | :--compute | compute:--socket | compute:1 | compute:--files-from | \
        report:--socket | report:1 | report:--files-from | report:-o | report:--output | \
        ping:--socket | status:--socket | reload:--socket)
        _swipr_files -f ;;
    compute:--format)
        _swipr_words tuple csv json ndjson ;;
    esac
}
complete -F _swiprctl swiprctl

_swiprd() {
    local cur at early=''
    local -A takes=([:--config]=one [:--pid-file]=one [:--log-file]=one [:--model]=one \
        [:--precision]=one [:--cache-dir]=one [:--socket]=one [:--workers]=one [:--threads]=one \
        [:--idle-timeout]=one [:--compute-timeout]=one [:--load-timeout]=one \
        [:--drain-timeout]=one [:--line-timeout]=one [:--reply-timeout]=one \
        [:--max-connections]=one [:--max-per-user]=one [:--max-in-flight]=one \
        [:--max-line-bytes]=one [:--max-depth]=one [:--max-queue]=one [:--max-file-mib]=one \
        [:--max-megapixels]=one [:--max-worker-mib]=one [:--recycle-mib]=one [:--admin-users]=one \
        [:--log-level]=one [import:-o]=one [import:--output]=one [import:--labels]=one \
        [import:--activation]=one [import:--arch]=one [import:--license]=one [import:--size]=one \
        [import:--short-side]=one [import:--fit]=one [import:--resample]=one \
        [import:--orientation]=one [import:--mean]=one [import:--std]=one \
        [import:--jpeg-margin]=one [compile:--precision]=one [compile:--config]=one \
        [compile:--cache-dir]=one [compile:--threads]=one [show:--config]=one \
        [show:--cache-dir]=one [show:--threads]=one [verify:--config]=one [verify:--cache-dir]=one \
        [verify:--threads]=one [import:--check]=many [compile:2]=many)
    COMPREPLY=()
    _swipr_look
    case $at in
    :0)
        _swipr_words import compile show verify ;;
    :-)
        _swipr_words -h --help --version --config --detach --pid-file --log-file --model \
        --precision --cache-dir --socket --workers --threads --idle-timeout --compute-timeout \
        --load-timeout --drain-timeout --line-timeout --reply-timeout --max-connections \
        --max-per-user --max-in-flight --max-line-bytes --max-depth --max-queue --max-file-mib \
        --max-megapixels --max-worker-mib --recycle-mib --admin-users --log-level ;;
    import:-)
        _swipr_words -h --help -o --output --check --labels --activation --arch --license --size \
        --short-side --fit --resample --orientation --mean --std --jpeg-margin ;;
    compile:-)
        _swipr_words -h --help --precision --config --cache-dir --threads ;;
    show:-)
        _swipr_words -h --help --json --config --cache-dir --threads ;;
    verify:-)
        _swipr_words -h --help --config --cache-dir --threads ;;
    :--config | :--pid-file | :--log-file | :--model | :--socket | import:1 | import:-o | \
        import:--output | import:--check | compile:1 | compile:2 | compile:--config | show:1 | \
        show:--config | verify:1 | verify:--config)
        _swipr_files -f ;;
    :--precision)
        _swipr_words auto fp32 bf16 ;;
    :--cache-dir | compile:--cache-dir | show:--cache-dir | verify:--cache-dir)
        _swipr_files -d ;;
    :--log-level)
        _swipr_words debug info warning error ;;
    import:--activation)
        _swipr_words softmax sigmoid none ;;
    import:--fit)
        _swipr_words short_side square squish ;;
    import:--resample)
        _swipr_words area linear grid nearest box bilinear hamming bicubic lanczos ;;
    import:--orientation)
        _swipr_words apply jpeg ignore ;;
    compile:--precision)
        _swipr_words fp32 bf16 ;;
    esac
}
complete -F _swiprd swiprd
