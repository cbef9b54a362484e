"""The model of a trial as MLflow loads it: sound files in, classes and probabilities out.

MLflow keeps this file as text beside the weights and runs it when the model is loaded (models from code), so nothing is
unpickled. It stands on the package helix alone, which travels with the model.

A row of input has the bytes of a file in `wav`, or a path on the machine that predicts in `path`. A row of output has
`class`, its `probability`, and the `probabilities` of all classes by name.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from helix.training.predictor import Predictor


class AudioClassifier(PythonModel):
    """A trained classifier behind MLflow's interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights, whose sha256 is checked."""
        self.predictor = Predictor.read(Path(context.artifacts["weights"]), Path(context.artifacts["described"]))

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  (the base says that it returns nothing)
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """What stands in each sound. Raises AudioError where one cannot be used, ValueError where there is none."""
        given_BC = self.predictor.probabilities(_sounds(model_input))
        names = self.predictor.classes
        return pd.DataFrame(
            {
                "class": [names[row_C.argmax()] for row_C in given_BC],
                "probability": [float(row_C.max()) for row_C in given_BC],
                "probabilities": [dict(zip(names, map(float, row_C), strict=True)) for row_C in given_BC],
            }
        )


def _sounds(given: pd.DataFrame) -> list[Path | bytes]:
    # MLflow leaves out the columns that it does not know, a plain list has none: no rows at all would be the answer.
    return [_sound(row) for row in given.to_dict("records") or [{}]]


def _sound(row: dict[str, Any]) -> Path | bytes:
    """The one sound of a row."""
    found = [value for value in row.values() if isinstance(value, str | bytes | bytearray)]
    if len(found) != 1:
        raise ValueError(
            f"a row holds {len(found)} sounds; wanted one: the bytes of a file in the column wav, or a path in the "
            "column path, as in a DataFrame or a list of {'path': ...}"
        )
    return Path(found[0]) if isinstance(found[0], str) else bytes(found[0])


set_model(AudioClassifier())
