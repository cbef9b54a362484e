"""The science of HELIX: data, models and training on one machine. Never imports ray or mlflow."""
