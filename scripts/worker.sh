#!/usr/bin/env bash
# One process of a run, started by launch.sh directly, or by msrun, which calls it as `python`.
# Runs LAUNCH_PYTHON. If it fails, its rank and exit code are appended to LAUNCH_STATE/failed, since msrun does not
# report which rank failed first.
PATH=${PATH#"$LAUNCH_STATE:"}
"$LAUNCH_PYTHON" "$@"
code=$?
if [ "$code" -ne 0 ]; then
    name=$RANK_ID
    [ "${MS_ROLE:-}" != MS_SCHED ] || name=scheduler
    echo "$name $code" >> "$LAUNCH_STATE/failed"
fi
exit "$code"
