"""`python -m bench.cases.make_shapes`: writes bench/cases/shapes.json, the parameter shapes of real models. Needs
torchvision, timm and transformers.

Run by hand when a model is added; the benchmarks read the file, so that they need no model library.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision
import transformers

SHAPES = Path(__file__).with_name("shapes.json")


def from_transformers(model: str, config: str, **sizes: int) -> tuple[torch.nn.Module, str]:
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    arguments = ", ".join(f"{name}={value}" for name, value in sizes.items())
    return made, f"transformers {transformers.__version__}, {model}({config}({arguments})).parameters()"


def resnet50() -> tuple[torch.nn.Module, str]:
    version = torchvision.__version__.partition("+")[0]
    return torchvision.models.resnet50(), f"torchvision {version}, resnet50().parameters()"


def vit_l_16() -> tuple[torch.nn.Module, str]:
    name = "vit_large_patch16_224"
    return timm.create_model(name), f'timm {timm.__version__}, create_model("{name}").parameters()'


def rt_detr_v2() -> tuple[torch.nn.Module, str]:
    """On a ResNet-50: as many parameters as the large one of Ultralytics' YOLOv8 (43.7 M)."""
    return from_transformers("RTDetrV2ForObjectDetection", "RTDetrV2Config")


def bert_large() -> tuple[torch.nn.Module, str]:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return from_transformers("BertForPreTraining", "BertConfig", **sizes)


def gpt2_xl() -> tuple[torch.nn.Module, str]:
    return from_transformers("GPT2LMHeadModel", "GPT2Config", n_embd=1600, n_layer=48, n_head=25)


def llama_3_8b() -> tuple[torch.nn.Module, str]:
    sizes = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return from_transformers("LlamaForCausalLM", "LlamaConfig", **sizes, **heads)


class Dlrm(torch.nn.Module):
    """The multilayer perceptrons of MLPerf's DLRM, and as many embedding tables as Meta's published traces have, but
    small: of dimension 16, with 4 to 4,000 rows in equal steps of the logarithm."""

    TABLES, DIMENSION, LEAST, MOST = 856, 16, 4, 4_000

    def __init__(self) -> None:
        super().__init__()
        rows = [self.LEAST * (self.MOST / self.LEAST) ** (table / (self.TABLES - 1)) for table in range(self.TABLES)]
        self.tables = torch.nn.ModuleList(torch.nn.Embedding(round(count), self.DIMENSION) for count in rows)
        self.bottom = self.perceptron(13, 512, 256, 128)
        self.top = self.perceptron(479, 1024, 1024, 512, 256, 1)

    @staticmethod
    def perceptron(*widths: int) -> torch.nn.Sequential:
        return torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in itertools.pairwise(widths)))


def dlrm() -> tuple[torch.nn.Module, str]:
    return Dlrm(), "bench.cases.make_shapes.Dlrm().parameters()"


# Tensors and parameters as the models' authors count them (of the last one as first made): a library that builds
# another model is an error.
MODELS: dict[Callable[[], tuple[torch.nn.Module, str]], tuple[int, int]] = {
    resnet50: (161, 25_557_032),
    rt_detr_v2: (418, 42_731_082),
    vit_l_16: (296, 304_326_632),
    bert_large: (398, 336_226_108),
    gpt2_xl: (580, 1_557_611_200),
    llama_3_8b: (291, 8_030_261_248),
    dlrm: (872, 10_314_513),
}


def main() -> None:
    entries = {}
    for make, expected in MODELS.items():
        with torch.device("meta"):
            model, source = make()
        parameters = list(model.parameters())
        counted = (len(parameters), sum(parameter.numel() for parameter in parameters))
        if counted != expected:
            raise SystemExit(f"{make.__name__}: {counted} tensors and parameters, expected {expected}")
        entries[make.__name__] = {"source": source, "shapes": [list(parameter.shape) for parameter in parameters]}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    SHAPES.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
