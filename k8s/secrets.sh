#!/bin/sh
# Makes the Secrets of the local overlay with random contents: `sh k8s/secrets.sh [options of kubectl create secret]`.
# One that exists is left as it is. Nothing secret stands on a command line.
set -eu

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

create() {
    name="$1"
    shift
    if kubectl --namespace llava get secret "$name" > /dev/null 2>&1; then
        echo "secret/$name exists" >&2
        return
    fi
    kubectl --namespace llava create secret generic "$name" --from-env-file=/dev/stdin "$@"
}

# S3: SeaweedFS takes them as its only keys, every pod of the workflow uses them.
printf 'AWS_ACCESS_KEY_ID=llava\nAWS_SECRET_ACCESS_KEY=%s\n' "$(random)" | create llava-s3 "$@"
# MLflow: the user as whom the workflow logs in.
printf 'MLFLOW_TRACKING_USERNAME=llava\nMLFLOW_TRACKING_PASSWORD=%s\n' "$(random)" | create llava-mlflow "$@"
# MLflow's server: its database, what signs the sessions of browsers, and its administrator.
printf 'POSTGRES_PASSWORD=%s\nSESSION_KEY=%s\nADMIN_PASSWORD=%s\n' "$(random)" "$(random)" "$(random)" | create llava-mlflow-server "$@"
