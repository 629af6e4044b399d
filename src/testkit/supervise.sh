# Owns one throwaway cluster: makes it, runs the server on demand, and removes everything when its
# input ends. The kernel closes the pipe however the process at the other end terminates.
#
# arguments: the directory to make, the directory of the binaries, then arguments for the server
# input:     "start PORT", "kill SIGNAL"
# output:    "prepared" once, "ended" after each run of the server; anything else is an error

dir=$1
bin=$2
shift 2

# A Ctrl-C, or a test runner that kills its process group, must not end this shell before it has
# cleaned up.
trap '' HUP INT QUIT TERM PIPE
PATH=/usr/bin:/bin:/usr/sbin:/sbin${PATH:+:$PATH}
export PATH
umask 077

mkdir "$dir" 2>&1 || exit 1
# In a trap, and without a fork: a shell exits early if the machine can't start another process.
trap 'cd / && exec rm -rf "$dir"' EXIT
cd "$dir" || exit 1
exec 2>>log

mkfifo alive
if "$bin/initdb" --no-sync -A trust -U postgres -E UTF8 --locale=C -D "$dir/data" </dev/null >>log
then
    echo prepared
else
    echo "initdb failed"
fi

pid=
while read -r order argument
do
    case $order in
        start)
            # Reap the last run: Postgres takes a zombie that holds the lock file for a live server.
            wait
            rm -f ended
            # Only the server's processes hold the writing end, so it closes when the last of them
            # has ended. A pid can't tell that: it may be a zombie's, or reused by another process.
            (cat <alive; : >ended; echo ended) &
            "$bin/postgres" -D "$dir/data" -p "$argument" "$@" </dev/null >>log 2>&1 9>alive &
            pid=$!
            ;;
        kill)
            [ -z "$pid" ] || [ -e ended ] || kill -s "$argument" "$pid"
            ;;
    esac
done

if [ -n "$pid" ] && [ ! -e ended ]
then
    # A test may have paused the server.
    kill -s CONT "$pid"
    kill -s QUIT "$pid"
    waited=0
    until [ -e ended ] || [ "$waited" -ge 200 ]
    do
        [ "$waited" -ne 100 ] || kill -s KILL "$pid"
        sleep 0.05 || sleep 1
        waited=$((waited + 1))
    done
fi
[ ! -e ended ] || wait
