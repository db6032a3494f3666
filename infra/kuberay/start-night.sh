#!/bin/sh
# Starts the RayJob of a manifest and waits for its end, so that the CronJob's `Forbid` covers the whole night.
# A RayJob of that name which still runs is not disturbed: we wait for it instead. Exit 0 if it completed.
#   start-night.sh MANIFEST NAME [SECONDS BETWEEN LOOKS]
set -eu
manifest=$1 name=$2 pause=${3:-30}

# Asks until the API server answers; sets `status`, empty for a RayJob that does not exist or is quite new.
look() {
  until status=$(kubectl get rayjob "$name" --ignore-not-found --output 'jsonpath={.status.jobDeploymentStatus}'); do
    sleep "$pause"
  done
}

# A finished RayJob keeps its name until somebody removes it.
look
case $status in
  Complete | Failed) kubectl delete rayjob "$name" --wait ;;
esac
# Fails when it runs already: then this is the second pod of one night.
kubectl create --filename "$manifest" || kubectl get rayjob "$name"

while look; do
  case $status in
    Complete) exit 0 ;;
    Failed)
      kubectl get rayjob "$name" --output 'jsonpath={.status.reason}: {.status.message}'
      exit 1
      ;;
  esac
  sleep "$pause"
done
