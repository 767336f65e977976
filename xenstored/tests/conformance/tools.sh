#!/bin/sh
# Conformance of a xenstore daemon, as Debian's xenstore-utils see it. Usage: tools.sh SOCKET
# It asks for nothing of ours: any xenstored that serves SOCKET can be checked with it. Works below /conformance alone.
set -u
export XENSTORED_PATH="$1" LC_ALL=C
top=/conformance
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
checks=0 failures=0

# is WHAT EXPECTED GOT
is() {
    checks=$((checks + 1))
    if [ "$2" != "$3" ]; then
        failures=$((failures + 1))
        printf 'FAILED: %s\n  expected: %.300s\n  got:      %.300s\n' "$1" "$2" "$3"
    fi
}

# ok COMMAND…: must succeed
ok() {
    checks=$((checks + 1))
    "$@" > "$dir/out" 2> "$dir/err" || {
        failures=$((failures + 1))
        printf 'FAILED: %.100s: %.300s\n' "$*" "$(cat "$dir/err")"
    }
}

# no COMMAND…: must fail
no() {
    checks=$((checks + 1))
    if "$@" > "$dir/out" 2> "$dir/err"; then
        failures=$((failures + 1))
        printf 'FAILED: %.100s succeeded\n' "$*"
    fi
}

xenstore-rm $top 2> /dev/null

# write, read, exists
ok xenstore-write $top/a/b hello $top/a/c "two words"
is "read of two" "hello
two words" "$(xenstore-read $top/a/b $top/a/c)"
is "read with the path" "$top/a/b: hello" "$(xenstore-read -p $top/a/b)"
is "a parent made on the way" "" "$(xenstore-read $top/a)"
ok xenstore-exists $top/a/b
ok xenstore-exists $top/a $top/a/b
no xenstore-exists $top/a/none
no xenstore-exists $top/a/b $top/a/none
no xenstore-read $top/a/none
ok xenstore-write $top/a/b changed
is "changed" changed "$(xenstore-read $top/a/b)"
ok xenstore-write $top/empty ""
is "an empty value" "" "$(xenstore-read $top/empty)"
no xenstore-write "$top/a b" x
no xenstore-write "$top//x" x
no xenstore-write "$top/x/" x
no xenstore-read relative/of/nobody

# binary values, NUL and all the rest
ok xenstore-write $top/bin '\x00\x01\x02\n\x7f\x80\xff'
is "a binary value" '\000\001\002\n\x7f\x80\xff' "$(xenstore-read $top/bin)"
is "raw" "0001020a7f80ff" "$(xenstore-read -R $top/bin | od -An -tx1 | tr -d ' \n')"
i=0 value='' hex=''
while [ $i -lt 256 ]; do
    value="$value$(printf '\\x%02x' $i)" hex="$hex$(printf '%02x' $i)"
    i=$((i + 1))
done
ok xenstore-write $top/all "$value"
is "all 256 bytes" "$hex" "$(xenstore-read -R $top/all | od -An -v -tx1 | tr -d ' \n')"
long=$(head -c 3900 /dev/zero | tr '\0' x)
ok xenstore-write $top/long "$long"
is "a long value" "$long" "$(xenstore-read $top/long)"

# list, ls
ok xenstore-write $top/l/one 1 $top/l/two 2 $top/l/one/below 3
is "list" "one
two" "$(xenstore-list $top/l | sort)"
is "list with the path" "$top/l/one
$top/l/two" "$(xenstore-list -p $top/l | sort)"
is "ls" 'one = "1"
 below = "3"
two = "2"' "$(xenstore-ls $top/l)"
is "ls with whole paths" "$top/l/one = \"1\"
$top/l/one/below = \"3\"
$top/l/two = \"2\"" "$(xenstore-ls -f $top/l)"
is "list of a leaf" "" "$(xenstore-list $top/l/two)"
no xenstore-list $top/none
no xenstore-ls $top/none

# chmod
ok xenstore-chmod $top/a n0 r3 w4 b5
is "permissions" "c = \"two words\"   (n0)" "$(xenstore-ls -p $top/a | grep '^c' | tr -d . | tr -s ' ' | sed 's/" (/"   (/')"
# (An owner that does not exist is refused by some daemons, so domain 0 is it.)
ok xenstore-chmod $top/a/b b0
case "$(xenstore-ls -p $top/a)" in *"(b0)"*) is "owner and default" x x ;; *) is "owner and default" "(b0)" "$(xenstore-ls -p $top/a)" ;; esac
ok xenstore-chmod -r $top/l r0 b2
is "recursively" "3" "$(xenstore-ls -p $top/l | grep -c '(r0,b2)')"
no xenstore-chmod $top/none r1
no xenstore-chmod $top/a q1

# watch: the event at registration, a change, a change below, what a removed node's watch is told
xenstore-watch -n 4 $top/w > "$dir/watch" &
watch=$!
i=0
while [ ! -s "$dir/watch" ] && [ $i -lt 100 ]; do
    sleep 0.05
    i=$((i + 1))
done
ok xenstore-write $top/w 1
ok xenstore-write $top/w/below 2
ok xenstore-rm $top/w
wait $watch
is "watch" "$top/w
$top/w
$top/w/below
$top/w" "$(cat "$dir/watch")"

# 200 children with long names: more than one reply holds (DIRECTORY_PART)
i=0
: > "$dir/names"
set --
while [ $i -lt 200 ]; do
    name=$(printf 'a-child-with-a-rather-long-name-so-that-no-reply-holds-them-all-%06d' $i)
    echo "$name" >> "$dir/names"
    set -- "$@" "$top/many/$name" "$i"
    i=$((i + 1))
done
ok xenstore-write "$@"
is "200 children by list" "$(cat "$dir/names")" "$(xenstore-list $top/many | sort)"
is "200 children by ls" 200 "$(xenstore-ls $top/many | grep -c 'a-child-with')"
is "the last of them" 199 "$(xenstore-read $top/many/a-child-with-a-rather-long-name-so-that-no-reply-holds-them-all-000199)"

# rm
ok xenstore-rm $top/a/b
no xenstore-exists $top/a/b
ok xenstore-exists $top/a/c
no xenstore-rm $top/nowhere/none
ok xenstore-rm -t $top/l/one/below
no xenstore-exists $top/l/one/below
ok xenstore-rm $top
no xenstore-exists $top

echo "tools: $checks checks, $failures failed"
[ $failures -eq 0 ]
