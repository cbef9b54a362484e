#!/bin/sh
# Starts the MLflow server with what it must have: sign-in, its database, its bucket. Secrets are files in SECRETS, one
# each, and never arguments: the address of the database holds no password, libpq takes it from PGPASSWORD.
set -eu

: "${ARTIFACTS:?ARTIFACTS is not set; wanted s3://BUCKET/PREFIX}"
: "${ALLOWED_HOSTS:?ALLOWED_HOSTS is not set; wanted the names that people and jobs use, such as mlflow.internal:*}"
secrets=${SECRETS:-/run/secrets}
PGPASSWORD=$(cat "$secrets/postgres_password")
MLFLOW_AUTH_ADMIN_PASSWORD=$(cat "$secrets/admin_password")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$secrets/flask_secret_key")
export PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
for value in "$PGPASSWORD" "$MLFLOW_AUTH_ADMIN_PASSWORD" "$MLFLOW_FLASK_SERVER_SECRET_KEY"; do
    if [ "${#value}" -lt 16 ]; then
        echo "serve.sh: a secret in $secrets has ${#value} characters; wanted 16 or more" >&2
        exit 2
    fi
done
export MLFLOW_AUTH_CONFIG_PATH="${MLFLOW_AUTH_CONFIG_PATH:-/opt/mlflow/basic_auth.ini}"
# Jobs of language models, which would start a dozen processes more.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
# Each worker holds its connections; several sweeps send at once.
export MLFLOW_SQLALCHEMYSTORE_POOL_SIZE=10 MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW=20
exec mlflow server --app-name basic-auth --host "${HOST:-0.0.0.0}" --port "${PORT:-5000}" --workers "${WORKERS:-2}" \
    --backend-store-uri "${DATABASE:-postgresql+psycopg2://mlflow@postgres:5432/mlflow}" \
    --artifacts-destination "$ARTIFACTS" --allowed-hosts "$ALLOWED_HOSTS"
