#!/usr/bin/env bash
# Run every finding, one after the other, each in a temporary folder of its own; a table at the end. Exits 1 if one changed.
set -uo pipefail
cd "$(dirname "$0")"
table="" changed=0
for script in *.sh; do
  [ "$script" = run-all.sh ] && continue
  folder=$(mktemp -d)
  echo "== $script"
  if TMPDIR=$folder bash "$script"; then
    result="as stated"
  else
    result="CHANGED (exit code $?)" changed=1
  fi
  rm -rf "$folder"
  table+=$(printf '%-40s %s' "$script" "$result")$'\n'
done
printf '\n%s' "$table"
exit $changed
