#!/bin/bash
# Scores one image by its path: compute.sh IMAGE [SOCKET]
#
# The daemon opens the image and must be allowed to: a shell cannot send a descriptor. The exit
# status is 1 where the image cannot be scored, 3 where the daemon does not answer, is busy or late.
# This needs bash 4.4, socat, and timeout from coreutils.
seconds=30
LC_ALL=C # a character is a byte, and a number has a point

fail() { # STATUS CODE MESSAGE
    printf '%s: %s\n' "$2" "$3" >&2
    exit "$1"
}

usage="compute.sh IMAGE [SOCKET], with nothing but letters, digits and /._+- in SOCKET, for socat"
(($# == 1 || $# == 2)) || fail 2 usage "$usage"
socket=${2:-${SWIPR_SOCKET:-/run/swipr/swipr.sock}}
[[ $socket != *[!a-zA-Z0-9/._+-]* ]] || fail 2 usage "$usage"
image=$1
[[ $image == /* ]] || image=$PWD/$image

# A file's name holds any bytes. Those beyond ASCII are written one by one, as the protocol has it
# for what is not UTF-8: so it need not be known whether they are.
path=
for ((i = 0; i < ${#image}; i++)); do
    byte=${image:i:1}
    case $byte in
        [\"\\]) path+=\\$byte ;;
        [\ -~]) path+=$byte ;;
        *)
            printf -v value %d "'$byte"
            printf -v byte '\\u%04x' $((value < 128 ? value : 0xdc00 + value))
            path+=$byte
            ;;
    esac
done

# After its input has ended socat waits for the reply as long as -t says, and in all no longer than
# timeout lets it. What it complains of comes where the reply would.
request="{\"timeout_ms\":${seconds}000,\"path\":\"$path\"}"
if ! IFS= read -r reply < <(
    printf '%s\n' "$request" |
        timeout "$seconds" socat -t $((2 * seconds)) - "UNIX-CONNECT:$socket" 2>&1
); then
    reply= # or only a part of one
fi
if [[ $reply != \{* ]]; then
    wait $!
    case $? in
        0) [[ -z $reply ]] || fail 1 bad_reply "neither scores nor an error" ;;
        124) fail 3 timeout "$socket: no answer within $seconds s" ;;
    esac
    reply=${reply##*] E }
    fail 3 cannot_connect "$socket: ${reply:-no answer}"
fi

# A reply is compact, and in a string of JSON's a quote has a backslash before it: what is looked
# for here can only be a key.
is_code='"code":"([a-z_]+)"'
is_message='"message":"(([^"\\]|\\.)*)"'
number='-?[0-9][-+.0-9e]*'
is_scores="\"scores\":\\[($number(,$number)*)\\]"
if [[ $reply == *'"error":'* && $reply =~ $is_code ]]; then
    code=${BASH_REMATCH[1]}
    [[ $reply =~ $is_message ]]
    message=${BASH_REMATCH[1]}
    [[ $code == timeout || $reply == *'"retryable":true'* ]] && fail 3 "$code" "$message"
    fail 1 "$code" "$message"
fi
[[ $reply != *'"error":'* && $reply =~ $is_scores ]] ||
    fail 1 bad_reply "neither scores nor an error"
IFS=, read -ra scores <<<"${BASH_REMATCH[1]}"
printf -v tuple '%.6f,' "${scores[@]}"
printf '%s\n' "${tuple%,}" || fail 1 internal "the scores cannot be written"
