"""`python -m bench.make_shapes`: writes bench/shapes.json, the parameter shapes of real models. Needs torchvision.

Run by hand when a model is added; the benchmarks read the file, so that they need no model library.
"""

import json
from pathlib import Path

import torch
import torchvision

SHAPES = Path(__file__).with_name("shapes.json")
MODELS = ("resnet50",)


def main() -> None:
    models = {}
    for name in MODELS:
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        models[name] = {
            "source": f"torchvision {torchvision.__version__.partition('+')[0]}, {name}().parameters()",
            "shapes": [list(parameter.shape) for parameter in model.parameters()],
        }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(model)}" for name, model in models.items())
    SHAPES.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
