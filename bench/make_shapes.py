"""`python -m bench.make_shapes`: writes bench/shapes.json, the parameter shapes of real models. Needs torchvision and
transformers.

Run by hand when a model is added; the benchmarks read the file, so that they need no model library.
"""

import json
from pathlib import Path

import torch
import torchvision
import transformers

SHAPES = Path(__file__).with_name("shapes.json")

# Tensors and parameters as the models' authors count them: a library that builds another model is an error.
EXPECTED = {"resnet50": (161, 25_557_032), "vit_l_16": (296, 304_326_632), "gpt2_xl": (580, 1_557_611_200)}


def from_torchvision(name: str) -> tuple[torch.nn.Module, str]:
    version = torchvision.__version__.partition("+")[0]
    return torchvision.models.get_model(name), f"torchvision {version}, {name}().parameters()"


def gpt2_xl() -> tuple[torch.nn.Module, str]:
    config = transformers.GPT2Config(n_embd=1600, n_layer=48, n_head=25)
    source = "GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25)).parameters()"
    return transformers.GPT2LMHeadModel(config), f"transformers {transformers.__version__}, {source}"


def main() -> None:
    with torch.device("meta"):
        models = {name: from_torchvision(name) for name in ("resnet50", "vit_l_16")} | {"gpt2_xl": gpt2_xl()}
    entries = {}
    for name, (model, source) in models.items():
        parameters = list(model.parameters())
        counted = (len(parameters), sum(parameter.numel() for parameter in parameters))
        if counted != EXPECTED[name]:
            raise SystemExit(f"{name}: {counted} tensors and parameters, expected {EXPECTED[name]}")
        entries[name] = {"source": source, "shapes": [list(parameter.shape) for parameter in parameters]}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    SHAPES.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
