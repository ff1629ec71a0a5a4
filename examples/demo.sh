#!/bin/sh
# What `make demo` runs: a whole AFS cluster on this machine, one command in an image, and everything stopped again.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
work=$(mktemp -d /tmp/afs-demo.XXXXXX)
trap 'rm -rf "$work"' EXIT

echo "== A real image, built here as an OCI image layout; no registry is needed"
image=$(python -m tests.testbed.images busybox)
echo "$image"

echo "== A directory to upload"
mkdir -p "$work/upload/work"
printf 'three\none\ntwo\n' >"$work/upload/work/words.txt"
cat >"$work/upload/work/job.sh" <<'JOB'
#!/bin/sh
echo "running as $(id -un) in /work, with $(wc -l <words.txt) words"
sort words.txt >sorted.txt
rm words.txt
echo "a complaint on stderr" >&2
exit 7
JOB
chmod +x "$work/upload/work/job.sh"
(cd "$work/upload" && find . -type f)

echo "== Start two nodes, run the job in the image, stop everything"
code=0
afs up --any-port --state-dir "$work/state" -- \
    afs_cli execute --image "$image" --cpu 1 --memory-mb 256 --timeout 30s \
    --dir "$work/upload" --out "$work/diff.tar.gz" -- sh -c 'cd /work && ./job.sh' || code=$?

echo "== Exit code: $code"
echo "== The changed files that came back (.wh. marks a deletion)"
tar -tvzf "$work/diff.tar.gz"
echo "== sorted.txt"
tar -xOzf "$work/diff.tar.gz" work/sorted.txt

if grep -q " $work" /proc/self/mounts; then
    echo "demo: mounts are left below $work" >&2
    exit 1
fi
[ "$code" = 7 ] || { echo "demo: expected exit code 7" >&2; exit 1; }
