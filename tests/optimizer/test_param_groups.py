"""weight_decay_param_groups: which parameters get weight decay, what optimizers and schedulers make of the groups,
and what is said of bad input. Run by pytest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from wd_fused import FusedSGD, weight_decay_param_groups

OPTIMIZERS = [torch.optim.SGD, FusedSGD]


def names_of(model: nn.Module, group: dict[str, Any]) -> set[str]:
    """The first name of each parameter in the group; fails if one is there twice."""
    first_name = {id(p): name for name, p in model.named_parameters()}
    assert len({id(p) for p in group["params"]}) == len(group["params"])
    return {first_name[id(p)] for p in group["params"]}


def decayed(model: nn.Module, **arguments: Any) -> set[str]:
    """The names that get weight decay, after a check that the two groups hold every trainable parameter once."""
    decay, rest = weight_decay_param_groups(model, 0.1, **arguments)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    with_decay, without_decay = names_of(model, decay), names_of(model, rest)
    assert not with_decay & without_decay
    assert with_decay | without_decay == {name for name, p in model.named_parameters() if p.requires_grad}
    return with_decay


class TwoEmbeddings(nn.Module):
    """A language model's outline: `head.weight` is tied to `tokens.weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.positions = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.tokens.weight


class DeclaresItsOwn(nn.Module):
    """As timm's models do: a method that returns names, one of which this model does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3, 4))
        self.layer = nn.Linear(4, 4)

    def no_weight_decay(self) -> set[str]:
        return {"position", "distillation_token"}


class NormWithProjection(nn.LayerNorm):
    """A norm whose scale is computed from a condition: the projection in it is an ordinary weight."""

    def __init__(self) -> None:
        super().__init__(4)
        self.projection = nn.Linear(4, 4)


# ---- which group


def test_weights_decay_and_biases_do_not() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(4, 3))
    assert decayed(model) == {"0.weight", "2.weight"}


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm3d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.LayerNorm((3, 4)),
        nn.RMSNorm(4),
        nn.RMSNorm((3, 4)),
    ],
    ids=lambda norm: str(norm),
)
def test_norm_parameters_do_not_decay_whatever_their_dimension(norm: nn.Module) -> None:
    # Given two dimensions by hand where the module has one, so that only the type of the module can tell.
    for parameter in norm.parameters():
        parameter.data = torch.ones(3, 4)
    assert decayed(nn.Sequential(norm, nn.Linear(2, 2, bias=False))) == {"1.weight"}
    outside = nn.ParameterList(norm.parameters())
    assert decayed(outside) == {name for name, _ in outside.named_parameters()}


def test_an_ordinary_weight_inside_a_derived_norm_module_decays() -> None:
    assert decayed(NormWithProjection()) == {"projection.weight"}


def test_norms_without_affine_parameters_add_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), nn.InstanceNorm1d(4))
    assert decayed(model) == {"0.weight"}


def test_parameters_of_fewer_than_two_dimensions_do_not_decay() -> None:
    model = nn.ParameterDict(
        {"gate": torch.tensor(1.0), "scale": torch.ones(4), "matrix": torch.ones(4, 4), "empty": torch.ones(0, 4)}
    )
    assert decayed(model) == {"matrix", "empty"}


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 1, 1), (1, 1, 3), (1, 3), (3, 1), (1, 1), (1, 1, 1, 1)])
def test_vectors_in_disguise_do_not_decay(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model.scale = nn.Parameter(torch.ones(shape))
    assert decayed(model) == {"0.weight"}


@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 3, 1, 1), (1, 1, 3, 3)])
def test_other_parameters_with_sizes_of_1_decay(shape: tuple[int, ...]) -> None:
    assert decayed(nn.ParameterList([torch.ones(shape)])) == {"0"}


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (nn.Linear(3, 1), {"weight"}),
        (nn.Linear(1, 1), {"weight"}),
        (nn.Conv2d(3, 1, 1), {"weight"}),
        (nn.ConvTranspose1d(1, 3, 1), {"weight"}),
        (nn.Conv1d(3, 3, 1, groups=3), {"weight"}),
        (nn.Embedding(1, 3), {"weight"}),
        (nn.Bilinear(1, 3, 1), {"weight"}),
        (nn.GRU(1, 1), {"weight_ih_l0", "weight_hh_l0"}),
        (nn.LSTMCell(1, 1), {"weight_ih", "weight_hh"}),
        (nn.MultiheadAttention(1, 1), {"in_proj_weight", "out_proj.weight"}),
        (parametrizations.orthogonal(nn.Linear(3, 1)), {"parametrizations.weight.original"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_of_layers_with_one_row_decay(layer: nn.Module, weights: set[str]) -> None:
    assert decayed(layer) == weights


def test_a_scale_that_a_layer_has_beside_its_weight_does_not_decay() -> None:
    layer = nn.Conv2d(2, 3, 3)
    layer.gain = nn.Parameter(torch.ones(3, 1, 1, 1))  # as convolutions with standardized weights have
    assert decayed(layer) == {"weight"}


def test_biases_of_more_dimensions_are_known_by_name() -> None:
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    assert attention.bias_k is not None and attention.bias_k.ndim == 3
    assert decayed(attention) == {"in_proj_weight", "out_proj.weight"}
    assert decayed(nn.ParameterDict({"relative_bias": torch.ones(2, 2), "biased": torch.ones(2, 2)})) == {"biased"}
    assert decayed(nn.ParameterDict({"bias": torch.ones(2, 2), "weight": torch.ones(2, 2)})) == {"weight"}


def test_parametrized_tensors_keep_their_group() -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    assert decayed(layer) == {"parametrizations.weight.original0", "parametrizations.weight.original1"}
    norm = nn.LayerNorm((2, 2))
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    assert decayed(nn.Sequential(norm, nn.Linear(2, 2))) == {"1.weight"}
    assert decayed(nn.Sequential(layer), no_decay="0.weight") == set()
    assert decayed(layer, no_decay="*.original0") == {"parametrizations.weight.original1"}


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    decay, rest = weight_decay_param_groups(model, 0.1)
    assert (names_of(model, decay), names_of(model, rest)) == ({"1.weight"}, {"1.bias"})


def test_a_tied_parameter_is_there_once() -> None:
    assert decayed(TwoEmbeddings()) == {"tokens.weight", "positions.weight"}


@pytest.mark.parametrize("name", ["tokens.weight", "head.weight"])
def test_a_tied_parameter_is_exempt_under_any_of_its_names(name: str) -> None:
    assert decayed(TwoEmbeddings(), no_decay=name) == {"positions.weight"}


def test_a_parameter_tied_to_a_norm_does_not_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm((3, 4)))
    model[0].weight = model[1].weight
    assert decayed(model) == set()


def test_a_module_used_twice_is_sorted_under_both_names() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": layer, "second": layer, "third": nn.Linear(4, 4)})
    assert decayed(model) == {"first.weight", "third.weight"}
    assert decayed(model, no_decay="second.*") == {"third.weight"}


def test_order_is_the_models_own() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("head", "body", "tail", "arm")})
    for group in weight_decay_param_groups(model, 0.1, named=True):
        order = [name for name, _ in model.named_parameters() if name in set(group["param_names"])]
        assert group["param_names"] == order
        assert [id(p) for p in group["params"]] == [id(model.get_parameter(name)) for name in order]


# ---- by name


@pytest.mark.parametrize(
    ("no_decay", "expected"),
    [
        ("tokens.weight", {"positions.weight"}),
        ("*.weight", set()),
        (["tok*", "*itions*"], set()),
        ("[p]ositions.weight", {"tokens.weight"}),
        ((), {"tokens.weight", "positions.weight"}),
        (iter(["positions.*"]), {"tokens.weight"}),
    ],
)
def test_patterns_match_the_whole_name(no_decay: Any, expected: set[str]) -> None:
    assert decayed(TwoEmbeddings(), no_decay=no_decay) == expected


def test_a_pattern_that_matches_only_frozen_parameters_is_no_mistake() -> None:
    model = TwoEmbeddings()
    model.positions.requires_grad_(False)
    assert decayed(model, no_decay="positions.*") == {"tokens.weight"}


def test_a_models_own_declaration_counts_at_the_top_and_inside_another_model() -> None:
    assert decayed(DeclaresItsOwn()) == {"layer.weight"}
    assert decayed(nn.ModuleDict({"backbone": DeclaresItsOwn(), "head": nn.Linear(4, 2)})) == {
        "backbone.layer.weight",
        "head.weight",
    }


def test_a_models_own_declaration_may_use_any_name_of_a_tied_parameter() -> None:
    model = DeclaresItsOwn()
    model.alias = model.position
    del model.position
    model.position = model.alias  # now the second name of the same parameter
    assert decayed(model) == {"layer.weight"}


def test_a_parameter_marked_by_its_author_does_not_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight._no_weight_decay = True
    model[1].weight._no_weight_decay = False
    assert decayed(model) == {"1.weight"}


# ---- what optimizers and schedulers make of it


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_only_the_first_group_shrinks_when_gradients_are_zero(optimizer_class: type[torch.optim.SGD]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_class(weight_decay_param_groups(model, 0.5), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.75 if name == "0.weight" else 1.0)
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_further_options_reach_both_groups(optimizer_class: type[torch.optim.SGD]) -> None:
    groups = weight_decay_param_groups(nn.Linear(4, 4), 0.1, lr=0.25, momentum=0.5)
    optimizer = optimizer_class(groups, lr=9.0, weight_decay=9.0)
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.25, 0.5, 0.1),
        (0.25, 0.5, 0.0),
    ]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("empty", ["decay", "no decay"])
def test_an_empty_group_keeps_its_place(optimizer_class: type[torch.optim.SGD], named: bool, empty: str) -> None:
    model: nn.Module = nn.Linear(4, 4, bias=False) if empty == "no decay" else nn.LayerNorm(4)
    groups = weight_decay_param_groups(model, 0.1, named=named)
    assert [len(group["params"]) == 0 for group in groups] == [empty == "decay", empty == "no decay"]
    optimizer = optimizer_class(groups, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5, lambda step: 0.25])
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_names_reach_the_state_dict_if_asked_for(optimizer_class: type[torch.optim.SGD]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    saved = optimizer_class(weight_decay_param_groups(model, 0.1, named=True), lr=0.1).state_dict()["param_groups"]
    assert [group["param_names"] for group in saved] == [["0.weight"], ["0.bias", "1.weight", "1.bias"]]
    unnamed = optimizer_class(weight_decay_param_groups(model, 0.1), lr=0.1)
    assert all("param_names" not in group for group in unnamed.state_dict()["param_groups"])
    unnamed.add_param_group({"params": [nn.Parameter(torch.ones(2))]})  # torch refuses this next to named groups


def test_weight_decay_may_be_a_tensor() -> None:
    weight_decay = torch.tensor(0.1)
    assert weight_decay_param_groups(nn.Linear(2, 2), weight_decay)[0]["weight_decay"] is weight_decay


def test_the_groups_do_not_share_lists_or_touch_the_model() -> None:
    model = TwoEmbeddings()
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    first, second = weight_decay_param_groups(model, 0.1), weight_decay_param_groups(model, 0.1)
    first[0]["params"].clear()
    assert len(second[0]["params"]) == 2
    assert before == [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


# ---- bad input


@pytest.mark.parametrize("weight_decay", [-1e-4, float("nan"), torch.tensor(-1.0)])
def test_a_weight_decay_below_zero_is_refused(weight_decay: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid weight_decay value: .*use a number >= 0"):
        weight_decay_param_groups(nn.Linear(2, 2), weight_decay)


@pytest.mark.parametrize("weight_decay", ["5e-4", None, [0.1], torch.tensor([0.1, 0.2])])
def test_a_weight_decay_that_is_no_number_is_refused(weight_decay: Any) -> None:
    with pytest.raises(TypeError, match="weight_decay must be a number"):
        weight_decay_param_groups(nn.Linear(2, 2), weight_decay)


@pytest.mark.parametrize("model", [nn.Linear(2, 2).parameters(), [nn.Linear(2, 2)], None, nn.Linear])
def test_what_is_not_a_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, but got \w+; pass the model itself"):
        weight_decay_param_groups(model, 0.1)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("norm", r"did you mean '\*norm\*', which matches 'norm\.weight'"),
        ("token.weight", r"such as 'tokens\.weight'"),
        ("module.tokens.*", r"such as 'tokens\.weight'"),
        ("TOKENS.*", "such as"),
        ("", "such as"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_a_hint(pattern: str, hint: str) -> None:
    with pytest.raises(
        ValueError, match=rf"no_decay pattern '{pattern.replace('*', '[*]')}' matches no parameter.*{hint}"
    ):
        weight_decay_param_groups(TwoEmbeddings(), 0.1, no_decay=["positions.*", pattern])


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no trainable parameter \(2 in all.*requires_grad_\(True\)"):
        weight_decay_param_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        weight_decay_param_groups(nn.ReLU(), 0.1)


def test_a_lazy_module_is_refused_until_it_has_seen_a_batch() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"parameter '0\.weight' has no shape yet; run one batch"):
        weight_decay_param_groups(model, 0.1)
    model(torch.ones(2, 4))
    assert decayed(model) == {"0.weight"}


@pytest.mark.parametrize("key", ["params", "param_names"])
def test_an_option_that_the_groups_set_themselves_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"option '{key}' is set by weight_decay_param_groups itself"):
        weight_decay_param_groups(nn.Linear(2, 2), 0.1, **{key: []})
