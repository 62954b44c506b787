#!/usr/bin/env bash
# Runs one sweep on a VastAI instance, and ends the instance. Written by sweeper; VastAI runs it at each start.
set -euo pipefail
umask 077
sweep=@SWEEP@
series=@SERIES@
limit_s=@LIMIT_S@
grace_s=@GRACE_S@
linger_s=@LINGER_S@
retry_s=@RETRY_S@
shutdown=@SHUTDOWN@
fresh=@FRESH@
git_url=@GIT_URL@
git_branch=@GIT_BRANCH@
python=@PYTHON@
setup=(@SETUP@)
data=(@DATA@)
restore=(@RESTORE@)
launch=(@LAUNCH@)
save=(@SAVE@)

work="${SWEEPER_WORKSPACE:-/workspace}/sweeper-$sweep"
outputs="$work/outputs"
mkdir -p "$work"
cd "$work"
exec 9>lock
flock -n 9 || { echo "sweeper: $sweep runs here already"; exit 0; }
if [ -n "${SWEEPER_WORKSPACE-}" ]; then
  exec > >(exec tee -a onstart.log) 2>&1
else
  exec > >(exec tee -a onstart.log /proc/1/fd/1) 2>&1
fi
export SWEEP="$sweep" SWEEPER_DATA_DIR="$outputs"

say() { printf '[ONSTART %s] %s\n' "$series" "$*"; }
now() { date +%s; }

# VastAI gives the instance its id, and a key that is good for this instance only.
of_init() { tr '\0' '\n' </proc/1/environ 2>/dev/null | sed -n "s/^$1=//p" | head -n 1; }
: "${CONTAINER_ID:=$(of_init CONTAINER_ID)}" "${CONTAINER_API_KEY:=$(of_init CONTAINER_API_KEY)}"
export CONTAINER_ID CONTAINER_API_KEY

# METHOD BODY. The key is in no argument: anybody on the machine can read those.
api() {
  python3 -c 'import os, sys, urllib.request as u
e = os.environ
q = u.Request(e.get("VAST_URL", "https://console.vast.ai") + "/api/v0/instances/" + e["CONTAINER_ID"] + "/", sys.argv[2].encode(), method=sys.argv[1])
q.add_header("Authorization", "Bearer " + e["CONTAINER_API_KEY"])
q.add_header("Content-Type", "application/json")
u.urlopen(q, timeout=30)' "$@"
}

# destroy|stop, until it happens, which ends this script too. Past the limit nothing is kept.
leave() {
  local what=$1 tries=0
  while :; do
    if (($(now) >= end)); then what=destroy; fi
    if [ "$what" = destroy ]; then api DELETE '{}' || true; fi
    tries=$((tries + 1))
    # A destroy that is refused again and again: stopped costs less than running.
    if [ "$what" = stop ] || [ "$tries" -gt 5 ]; then api PUT '{"state":"stopped"}' || true; fi
    sleep $((retry_s < 1 ? 1 : retry_s))
    say "still here; VastAI is asked again to $what this instance"
  done
}

# done|failed|cut|lost|stopped|unsaved REASON: the last word, which the launcher reads in the log.
finish() {
  trap - EXIT
  trap '' TERM INT HUP USR1
  : >"$work/ended"
  say "finished: $1: $2 ($(now))"
  if [ "$shutdown" = no ] && [ "$1" != cut ]; then exit 0; fi
  sleep "$linger_s"
  if [ "$1" = unsaved ]; then
    : >"$work/kept"
    leave stop
  fi
  leave destroy
}

# COMMAND…, in a process group of its own, so that all of it can be told to stop.
child=
run() {
  local code
  setsid "$@" 9>&- &
  child=$!
  echo "$child" >"$work/child"
  while :; do
    wait "$child" && code=0 || code=$?
    if ! kill -0 "$child" 2>/dev/null; then break; fi
  done
  child=
  return "$code"
}
line() { run bash -euo pipefail -c "$1"; }

# The copy is whole before the instance goes.
save_all() {
  local step try
  if [ ! -d "$outputs/sweep/$sweep/runs" ]; then return 0; fi
  for step in "${save[@]}"; do
    for try in 1 2 3 4 5; do
      say "save: $step"
      if line "$step"; then continue 2; fi
      if [ "$try" -lt 5 ]; then sleep $((retry_s * try)); fi
    done
    return 1
  done
}
end_with() {
  asked=ending
  if save_all; then finish "$@"; fi
  finish unsaved "THE COPY IS NOT COMPLETE: this instance is stopped, not destroyed ($1: $2)"
}

asked=
how=
on_signal() {
  if [ -n "$asked" ]; then return; fi
  how=$1 asked=$2
  if [ -n "$child" ]; then kill -TERM -- "-$child" 2>/dev/null || true; fi
}
stop_if_asked() { if [ -n "$asked" ]; then end_with "$how" "$asked"; fi; }

# NAME KEY LINE…: lines of shell, each of which has to succeed; only if that was not done before.
once() {
  local name=$1 key step code
  key=$(printf '%s\n' "${@:2}" | cksum)
  if [ "$(cat "$work/done.$name" 2>/dev/null)" = "$key" ]; then return 0; fi
  for step in "${@:3}"; do
    say "$name: $step"
    line "$step" && code=0 || code=$?
    stop_if_asked
    if [ "$code" -ne 0 ]; then end_with failed "$name: exit $code of: $step"; fi
  done
  printf '%s\n' "$key" >"$work/done.$name"
}

# Whatever hangs or dies elsewhere, this ends the instance.
watch() {
  local warned='' group
  while sleep "$tick_s"; do
    echo $((used + $(now) - began)) >"$work/used.tmp" && mv "$work/used.tmp" "$work/used" || true
    if (($(now) >= end)); then
      : >"$work/ended"
      say "finished: cut: the limit of $limit_s s is reached ($(now))"
      leave destroy
    fi
    if [ -e "$work/ended" ]; then continue; fi
    if [ -z "$warned" ] && (($(now) >= end - grace_s)); then
      warned=yes
      kill -USR1 "$main" 2>/dev/null || true
    fi
    if ! kill -0 "$main" 2>/dev/null; then
      group=$(cat "$work/child" 2>/dev/null || true)
      if [ -n "$group" ] && kill -TERM -- "-$group" 2>/dev/null; then sleep "$tick_s"; fi
      end_with lost "this script was killed"
    fi
  done
}

# The limit counts the time that this instance runs, over all its starts.
used=$(cat used 2>/dev/null || true)
if [[ ! $used =~ ^[0-9]+$ ]]; then used=0; fi
began=$(now)
end=$((began + limit_s - used))
# What was kept because its copy was not complete gets another quarter of an hour.
if [ -e kept ] && [ "$end" -lt $((began + 900)) ]; then end=$((began + 900)); fi
tick_s=$((retry_s < 1 ? 1 : retry_s < 5 ? retry_s : 5))
main=$$
rm -f ended child
say "began: $((end - $(now))) s are left"
trap 'on_signal stopped "the instance was told to stop"' TERM INT HUP
trap 'on_signal cut "the limit of $limit_s s is near"' USR1
trap 'finish failed "this script broke off"' EXIT
if [ -z "$CONTAINER_ID" ] || [ -z "$CONTAINER_API_KEY" ]; then
  shutdown=no
  finish failed "VastAI gave no CONTAINER_ID or no CONTAINER_API_KEY, so this instance cannot end itself"
fi
(
  trap - EXIT
  trap '' TERM INT HUP USR1
  watch
) 9>&- &

commit=
if [ -n "$git_url" ]; then
  git=(git)
  export GIT_TERMINAL_PROMPT=0
  # shellcheck disable=SC2016  # git's shell fills it in
  if [ -n "${GIT_TOKEN-}" ]; then git+=(-c 'credential.helper=!f() { echo username=git; echo "password=$GIT_TOKEN"; }; f'); fi
  if [ ! -d repo/.git ]; then
    rm -rf repo.tmp
    say "clone: $git_url $git_branch"
    run "${git[@]}" clone --quiet ${git_branch:+--branch "$git_branch"} -- "$git_url" repo.tmp ||
      end_with failed "git clone: exit $?"
    mv repo.tmp repo
  elif say "fetch: $git_url $git_branch" && run "${git[@]}" -C repo fetch --quiet origin "${git_branch:-HEAD}"; then
    git -C repo checkout --quiet --detach FETCH_HEAD
  else
    say "fetch: failed; the code that is here is used"
  fi
  stop_if_asked
  cd repo
  commit=$(git rev-parse HEAD)
fi

if [ -z "$python" ]; then
  python="$work/env/bin/python"
  if [ ! -e "$work/env/made" ]; then
    rm -rf "$work/env"
    say "environment: python3 -m venv"
    run python3 -m venv --system-site-packages "$work/env" || end_with failed "python3 -m venv: exit $?"
    : >"$work/env/made"
  fi
fi
export PATH="${python%/*}:$PATH" SWEEPER_PYTHON="$python"
once setup "$commit" "${setup[@]}"
once data "" "${data[@]}"

# A fresh start clears only what an earlier one made here, and not what this series has made.
if [ "$fresh" = yes ] && [ -e "$outputs" ] && [ "$(cat "$outputs/.onstart" 2>/dev/null)" != "$series" ]; then
  if [ ! -e "$outputs/.onstart" ]; then
    end_with failed "$outputs was not made by this script, so a fresh start does not clear it"
  fi
  say "fresh: what an earlier start made is cleared"
  rm -rf "$outputs"
fi
if [ ! -e "$outputs" ]; then
  mkdir "$outputs"
  echo "$series" >"$outputs/.onstart"
fi
if [ "$fresh" = no ] && [ ! -d "$outputs/sweep/$sweep/runs" ]; then once restore "" "${restore[@]}"; fi

code=75
for try in 1 2 3 4 5; do
  say "train: start $try"
  run "$python" -m "${launch[@]}" "data_dir=$outputs" && code=0 || code=$?
  stop_if_asked
  if [ "$code" -ne 75 ]; then break; fi
  sleep "$retry_s"
done
if [ "$code" -eq 0 ]; then end_with "done" "the sweep is complete"; fi
if [ "$code" -eq 76 ]; then finish failed "another machine has taken the sweep over"; fi
end_with failed "sweeper launch: exit $code"
