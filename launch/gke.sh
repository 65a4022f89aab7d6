#!/usr/bin/env bash
# Prints the Kubernetes manifest of a run on TPU slices of GKE: a JobSet, as xpk's workloads are, of a pod a host.
#
#   GKE_IMAGE=REGION-docker.pkg.dev/PROJECT/luthier:TAG GKE_ACCELERATOR=tpu-v5-lite-podslice GKE_TOPOLOGY=4x4 \
#     bash launch/gke.sh NAME HOSTS -- luthier train --config=… --workdir=gs://bucket/run | kubectl apply -f -
#
# HOSTS       hosts of a slice
# GKE_CHIPS   chips of a host (default 4)
# GKE_SLICES  slices, each a node pool (default 1)
# GKE_QUEUE   the queue of Kueue that it waits in: multislice-queue on a cluster made by xpk, none by default
#
# The cluster needs JobSet (https://jobset.sigs.k8s.io), which one made by xpk has. Where a host is taken away or a
# run stops with 75, all pods start again together and go on; a mistake (1 or 2) ends the run. xpk itself takes the
# same image and command:
#   xpk workload create --workload=NAME --tpu-type=v5litepod-16 --docker-image=$GKE_IMAGE --max-restarts=1000 \
#     --restart-on-exit-codes=75 --command='luthier train …'
set -euo pipefail

fail() { echo "launch/gke.sh: error: $1" >&2; exit 2; }

name="${1:-}" hosts="${2:-}" slices="${GKE_SLICES:-1}"
[[ "$name" =~ ^[a-z][a-z0-9-]*$ ]] || fail "NAME must be lower-case letters, digits and dashes, got '$name'"
[[ "$hosts" =~ ^[1-9][0-9]*$ ]] || fail "HOSTS must be a number, got '$hosts'"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "GKE_SLICES must be a number, got '$slices'"
[[ "${3:-}" == "--" && $# -gt 3 ]] || fail "write the command after NAME HOSTS --"
shift 3
[[ -n "${GKE_IMAGE:-}" ]] || fail "no image: set GKE_IMAGE to one with Luthier in it"
[[ -n "${GKE_ACCELERATOR:-}" ]] || fail "no accelerator: set GKE_ACCELERATOR, such as tpu-v5-lite-podslice"
[[ -n "${GKE_TOPOLOGY:-}" ]] || fail "no topology: set GKE_TOPOLOGY, such as 4x4"

# A YAML string in single quotes, in which only the quote itself is special.
quoted() { printf "'%s'" "${1//\'/\'\'}"; }

words=""
for word in "$@"; do words+="
                    - $(quoted "$word")"; done
queue=""
if [[ -n "${GKE_QUEUE:-}" ]]; then queue="
  labels:
    kueue.x-k8s.io/queue-name: $(quoted "$GKE_QUEUE")"; fi

cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name$queue
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 1000
    rules:
      - name: mistake
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          completionMode: Indexed
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  operator: In
                  values: [1, 2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(quoted "$GKE_ACCELERATOR")
                cloud.google.com/gke-tpu-topology: $(quoted "$GKE_TOPOLOGY")
              containers:
                - name: luthier
                  image: $(quoted "$GKE_IMAGE")
                  command:$words
                  resources:
                    requests:
                      google.com/tpu: ${GKE_CHIPS:-4}
                    limits:
                      google.com/tpu: ${GKE_CHIPS:-4}
YAML
