"""Attaching to objects of official classes: what is shared, that the same is drawn, and that nothing is left behind."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.core.conditions import ClassLabel
from foveate.core.errors import FoveateError, UnsupportedError
from foveate.core.guidance import GuidanceSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, ReferenceSampler, SmoothSampler
from foveate.engine.state import Request
from foveate.models.infinity import Infinity
from foveate.policies.registry import load_policy
from tests.adapters.stand_ins import OFFICIAL, OfficialAutoencoder, OfficialInfinity, OfficialVAR
from tests.toys import Toy, text_features, toy, toy_var

METHOD = "autoregressive_infer_cfg"
CFG, TAU = [2.0, 2.5, 3.0, 3.0, 2.0], [0.5, 1.0, 1.5, 1.0, 0.7]


@pytest.fixture
def var() -> OfficialVAR:
    return OfficialVAR(toy_var())


@pytest.fixture
def infinity() -> OfficialInfinity:
    return OfficialInfinity(toy("square"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(subject: Toy, request: Request, policy: str = "full") -> Tensor:
    """Pixels in [-1, 1], by our own networks."""
    bound = load_policy(policy).bind(request.schedule, subject.model.shape)
    *_, last = Engine(subject.model, subject.tokenizer).run(bound, request)
    return subject.tokenizer.decode(last.f_hat_BZHW)


def var_request(labels: list[int], sampler, cfg: float = 1.5, rule: Filter | None = None) -> Request:
    schedule = toy_var().schedule
    return Request(
        schedule=schedule,
        guidance=GuidanceSchedule.from_var(cfg, len(schedule)),
        temperatures=(1.0,) * len(schedule),
        filters=(rule or Filter(top_k=0, top_p=0.0),) * len(schedule),
        sampler=sampler,
        conditions=tuple(ClassLabel(index=label) for label in labels),
        num_images=len(labels),
    )


def text(*lengths: int, first: int = 0) -> tuple[Tensor, list[int], Tensor, int]:
    """Prompts as the official code packs them."""
    features = torch.cat([text_features(first + i, length) for i, length in enumerate(lengths)])
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return features, list(lengths), ends, max(lengths)


def call(subject: Toy, **changes: object) -> dict[str, object]:
    """Arguments of an Infinity call, much as the official script gives them."""
    arguments = {
        "vae": OfficialAutoencoder(subject),
        "scale_schedule": [(1, h, w) for h, w in subject.schedule.grids],
        "label_B_or_BLT": text(5, 9),
        "B": 2,
        "g_seed": 3,
        "cfg_list": CFG,
        "tau_list": TAU,
        "cfg_insertion_layer": [0],
        "vae_type": 8,
        "returns_vemb": 1,
        "ret_img": True,
        "gt_leak": -1,
        "inference_mode": True,
    }
    return arguments | changes


def infinity_request(subject: Toy, seed: int = 3, **changes: object) -> Request:
    request = Request(
        schedule=subject.schedule,
        guidance=GuidanceSchedule(weights=tuple(CFG)),
        temperatures=tuple(TAU),
        filters=(Filter(top_k=0, top_p=0.0),) * 5,
        sampler=ReferenceSampler(generator=generator(seed)),
        conditions=(text_features(0, 5), text_features(1, 9)),
        num_images=2,
    )
    return replace(request, **changes)


def as_bytes(pixels: Tensor) -> Tensor:
    """Blue, green, red; bytes."""
    return ((pixels + 1) / 2 * 255).to(torch.uint8)[:, [2, 1, 0]].permute(0, 2, 3, 1)


def storages(*modules: nn.Module) -> set[int]:
    return {parameter.data_ptr() for module in modules for parameter in module.parameters()}


# What is shared


def test_var_weights_are_shared_and_none_is_copied(var: OfficialVAR) -> None:
    with fv.attach(var) as attachment:
        engine = attachment.adapter.engine({})
        assert storages(engine.model, engine.tokenizer.autoencoder) == storages(var, var.vae_proxy[0])
        assert not any(p.requires_grad for p in engine.model.parameters())
    assert all(p.requires_grad for p in var.parameters()), "the object's own flags stay as they were"


@pytest.mark.parametrize(("chunks", "is_flash"), [(5, False), (1, False), (5, True)])
def test_infinity_weights_are_shared_under_every_naming(chunks: int, is_flash: bool) -> None:
    subject = toy("square")
    model = OfficialInfinity(subject, chunks=chunks, is_flash=is_flash)
    arguments = call(subject)
    with fv.attach(model) as attachment:
        engine = attachment.adapter.engine(arguments)
        assert storages(engine.model, engine.tokenizer.autoencoder) == storages(model, arguments["vae"])
        _, _, pictures = model.autoregressive_infer_cfg(**arguments)
    assert torch.equal(pictures, as_bytes(drawn(subject, infinity_request(subject))))


def test_what_happens_to_the_weights_is_followed(var: OfficialVAR) -> None:
    arguments = {"B": 2, "label_B": 3, "g_seed": 1}
    with fv.attach(var) as attachment:
        before = var.autoregressive_infer_cfg(**arguments)
        engine = attachment.adapter.engine({})
        assert attachment.adapter.engine({}).model is engine.model, "nothing is built twice"
        with torch.no_grad():
            var.head.bias.add_(torch.linspace(-9.0, 9.0, 48))
        assert attachment.adapter.engine({}).model is engine.model, "changed in place"
        assert not torch.equal(var.autoregressive_infer_cfg(**arguments), before)
        var.head.bias = nn.Parameter(toy_var().model.head.bias.clone())
        assert torch.equal(var.autoregressive_infer_cfg(**arguments), before), "another tensor"
        var.to(torch.bfloat16)
        assert attachment.adapter.engine({}).model.compute_dtype == torch.bfloat16
        assert storages(attachment.adapter.engine({}).model) == storages(var)
        assert torch.isfinite(var.autoregressive_infer_cfg(**arguments)).all()


# The same images


@pytest.mark.parametrize(
    ("label", "labels"),
    [(3, [3, 3]), (-1, [10, 10]), (torch.tensor([1, 9]), [1, 9]), (torch.tensor([10, 0]), [10, 0])],
    ids=["one", "none", "each", "each or none"],
)
def test_var_draws_what_our_engine_draws(var: OfficialVAR, label: int | Tensor, labels: list[int]) -> None:
    rule = Filter(top_k=20, top_p=0.9)
    wanted = drawn(toy_var(), var_request(labels, ReferenceSampler(generator=generator(4)), 3.0, rule))
    with fv.attach(var, "full"):
        found = var.autoregressive_infer_cfg(2, label, 4, cfg=3.0, top_k=20, top_p=0.9)
    assert torch.equal(found, (wanted + 1) / 2)
    assert found.std() > 0.05, "a flat picture proves nothing"
    found.add_(1)


def test_var_draws_classes_and_codes_from_one_generator(var: OfficialVAR) -> None:
    own = generator(6)
    labels = torch.multinomial(var.uniform_prob, 3, replacement=True, generator=own).flatten().tolist()
    wanted = drawn(toy_var(), var_request(labels, ReferenceSampler(generator=own)))
    with fv.attach(var):
        found = var.autoregressive_infer_cfg(B=3, label_B=None, g_seed=6)
    assert torch.equal(found, (wanted + 1) / 2)
    assert torch.equal(var.rng.get_state(), own.get_state())


def test_without_a_seed_the_global_generator_draws(var: OfficialVAR) -> None:
    wanted = drawn(toy_var(), var_request([2], ReferenceSampler(generator=generator(9))))
    with fv.attach(var), torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        assert torch.equal(var.autoregressive_infer_cfg(1, 2), (wanted + 1) / 2)
        assert not torch.equal(var.autoregressive_infer_cfg(1, 2), (wanted + 1) / 2)


def test_var_smooths(var: OfficialVAR) -> None:
    inner = ReferenceSampler(generator=generator(5))
    sampler = SmoothSampler(inner=inner, num_scales=5, first=0, end=5, is_after_draw=True)
    wanted = drawn(toy_var(), var_request([1, 1], sampler))
    with fv.attach(var):
        assert torch.equal(var.autoregressive_infer_cfg(2, 1, 5, more_smooth=True), (wanted + 1) / 2)


@pytest.mark.parametrize("name", ["square", "patches"])
@pytest.mark.parametrize("is_fused", [True, False])
def test_infinity_draws_what_our_engine_draws(name: str, is_fused: bool) -> None:
    subject = toy(name)
    model = OfficialInfinity(subject, is_fused=is_fused)
    own = Infinity(replace(subject.model.config, restarts_positions=not is_fused)).eval()
    own.load_state_dict(subject.model.state_dict())
    wanted = drawn(replace(subject, model=own), infinity_request(subject))
    with fv.attach(model, "full"):
        none, nothing, found = model.autoregressive_infer_cfg(**call(subject))
    assert torch.equal(found, as_bytes(wanted))
    assert (none, nothing) == ([], [])
    assert found.float().std() > 10, "a flat picture proves nothing"
    if not is_fused:
        assert not torch.equal(found, as_bytes(drawn(subject, infinity_request(subject))))


@pytest.mark.parametrize(
    ("insertion", "guidance"),
    [
        ([-2], {"hidden_blocks": (3,), "on_logits": False}),
        ([0, -2], {"hidden_blocks": (3,)}),
        ([-1, -3], {"hidden_blocks": (4, 2), "on_logits": False}),
    ],
)
def test_infinity_combines_branches_where_asked(
    infinity: OfficialInfinity, insertion: list[int], guidance: dict[str, object]
) -> None:
    subject = toy("square")
    request = infinity_request(subject, guidance=GuidanceSchedule(weights=tuple(CFG), **guidance))
    with fv.attach(infinity):
        found = infinity.autoregressive_infer_cfg(**call(subject, cfg_insertion_layer=insertion))[2]
    assert torch.equal(found, as_bytes(drawn(subject, request)))


def test_infinity_takes_negative_prompts_and_longer_lists(infinity: OfficialInfinity) -> None:
    subject = toy("square")
    conditions = tuple(text_features(i, n) for i, n in enumerate((5, 9, 3, 4)))
    changes = {"cfg_list": [*CFG, 7.0], "tau_list": [*TAU, 7.0], "negative_label_B_or_BLT": text(3, 4, first=2)}
    with fv.attach(infinity):
        found = infinity.autoregressive_infer_cfg(**call(subject, **changes))[2]
    assert torch.equal(found, as_bytes(drawn(subject, infinity_request(subject, conditions=conditions))))


def test_zero_filters_mean_the_own_ones_of_an_infinity_object(infinity: OfficialInfinity) -> None:
    subject = toy("square")
    infinity.top_k, infinity.top_p = 1, 0.9
    greedy = infinity_request(subject, filters=(Filter(top_k=1, top_p=0.9),) * 5)
    looser = infinity_request(subject, filters=(Filter(top_k=2, top_p=0.6),) * 5)
    with fv.attach(infinity):
        assert torch.equal(infinity.autoregressive_infer_cfg(**call(subject))[2], as_bytes(drawn(subject, greedy)))
        found = infinity.autoregressive_infer_cfg(**call(subject, top_k=2, top_p=0.6))[2]
    assert torch.equal(found, as_bytes(drawn(subject, looser)))


def test_autocast_is_obeyed(infinity: OfficialInfinity) -> None:
    subject, halves = toy("square"), OfficialInfinity(toy("square"))
    for block in halves.unregistered_blocks:
        block.to(torch.bfloat16)
    with fv.attach(infinity) as attachment, fv.attach(halves) as halved:
        infinity.autoregressive_infer_cfg(**call(subject))
        assert attachment.report is not None
        full = attachment.report.kv_bytes_peak
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one = infinity.autoregressive_infer_cfg(**call(subject))[2]
            other = halves.autoregressive_infer_cfg(**call(subject))[2]
        assert attachment.report.kv_bytes_peak == halved.report.kv_bytes_peak == full // 2
        assert one.float().std() > 10
        assert other.float().std() > 10
        with pytest.raises(FoveateError, match="bfloat16 and float32; call under torch.autocast"):
            halves.autoregressive_infer_cfg(**call(subject))


# Policies


def test_the_policy_acts_and_is_reported(var: OfficialVAR) -> None:
    request = var_request([1, 1], ReferenceSampler(generator=generator(2)))
    with fv.attach(var, "skip-scales:count=2") as attachment:
        assert attachment.report is None
        found = var.autoregressive_infer_cfg(2, 1, 2)
        assert attachment.report.flops_ratio < 0.4
        assert [scale.ran for scale in attachment.trace.scales] == [True, True, True, False, False]
        assert attachment.report.ms.total >= attachment.report.ms.transformer > 0
    assert torch.equal(found, (drawn(toy_var(), request, "skip-scales:count=2") + 1) / 2)


def test_attaching_again_replaces_the_policy(infinity: OfficialInfinity) -> None:
    subject = toy("square")
    first = fv.attach(infinity, "full")
    full = infinity.autoregressive_infer_cfg(**call(subject))[2]
    second = fv.attach(infinity, fv.UniformDepth(keep_ratio=0.6))
    assert second is first
    assert not torch.equal(infinity.autoregressive_infer_cfg(**call(subject))[2], full)
    assert second.report.flops_ratio < 1
    first.detach()
    assert not first.is_attached
    first.detach()
    assert infinity.autoregressive_infer_cfg() == OFFICIAL


# Nothing is left behind


@pytest.mark.parametrize("has_own", [False, True])
def test_detaching_restores_exactly_what_was_there(var: OfficialVAR, has_own: bool) -> None:
    def own(B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False):
        return "patched by somebody"

    if has_own:
        var.autoregressive_infer_cfg = own
    before = dict(vars(var))
    with fv.attach(var, "full"):
        assert isinstance(var.autoregressive_infer_cfg(1, 1, 1), Tensor)
    assert vars(var) == before
    assert var.autoregressive_infer_cfg(1, 1) == ("patched by somebody" if has_own else OFFICIAL)


def test_a_class_that_is_patched_meanwhile_stays_patched(var: OfficialVAR, monkeypatch: pytest.MonkeyPatch) -> None:
    with fv.attach(var):
        monkeypatch.setattr(OfficialVAR, METHOD, lambda self: "a newer class")
        assert isinstance(var.autoregressive_infer_cfg(1, 1, 1), Tensor)
    assert var.autoregressive_infer_cfg() == "a newer class"


def test_other_objects_of_the_class_are_left_alone(var: OfficialVAR) -> None:
    other = OfficialVAR(toy_var())
    with fv.attach(var):
        assert other.autoregressive_infer_cfg(1, 1) == OFFICIAL


def test_a_method_that_was_replaced_meanwhile_is_not_lost(var: OfficialVAR) -> None:
    attachment = fv.attach(var)
    ours = vars(var)[METHOD]
    vars(var)[METHOD] = len
    with pytest.raises(FoveateError, match="replaced after attach; undo that first"):
        attachment.detach()
    assert vars(var)[METHOD] is len
    vars(var)[METHOD] = ours
    attachment.detach()
    assert METHOD not in vars(var)


def test_the_stand_in_has_the_name_and_signature_of_the_method(var: OfficialVAR) -> None:
    before = inspect.signature(var.autoregressive_infer_cfg)
    with fv.attach(var):
        assert inspect.signature(var.autoregressive_infer_cfg) == before
        assert var.autoregressive_infer_cfg.__name__ == METHOD


def test_a_call_that_fails_leaves_the_object_usable(var: OfficialVAR) -> None:
    with fv.attach(var) as attachment:
        wanted = var.autoregressive_infer_cfg(1, 1, 1)
        report = attachment.report
        with pytest.raises(FoveateError, match="one class per image, got 2 for B=1"):
            var.autoregressive_infer_cfg(1, torch.tensor([1, 2]), 1)
        with pytest.raises(FoveateError, match="class must be 0 to 9"):
            var.autoregressive_infer_cfg(1, 11, 1)
        with pytest.raises(TypeError, match="label_B"):
            var.autoregressive_infer_cfg(1)
        assert attachment.is_attached
        assert attachment.report is report
        assert torch.equal(var.autoregressive_infer_cfg(1, 1, 1), wanted)


def test_an_error_inside_the_block_detaches(var: OfficialVAR) -> None:
    with pytest.raises(ZeroDivisionError), fv.attach(var):
        raise ZeroDivisionError
    assert METHOD not in vars(var)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gt_leak": 2}, "gt_leak=2 is not supported"),
        ({"ret_img": False}, "ret_img=False is not supported: no images would be returned"),
        ({"trunk_scale": 3}, "trunk_scale=3 is not supported: use the policy skip-scales"),
        ({"vae_type": 0}, "vae_type=0 is not supported"),
        ({"cfg_insertion_layer": [1]}, "cfg_insertion_layer=1 is not supported"),
        ({"newer_than_we_are": 2}, "the argument newer_than_we_are is not supported"),
        ({"scale_schedule": [(1, 1, 1), (2, 2, 2)]}, "several frames are not supported"),
    ],
)
def test_unsupported_arguments_are_named(infinity: OfficialInfinity, changes: dict[str, object], message: str) -> None:
    with fv.attach(infinity), pytest.raises(UnsupportedError, match=message):
        infinity.autoregressive_infer_cfg(**call(toy("square"), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": None}, "vae must be the official autoencoder, got NoneType"),
        ({"scale_schedule": None}, "scale_schedule must list"),
        ({"label_B_or_BLT": None}, "label_B_or_BLT must hold features"),
        ({"B": 3}, r"label_B_or_BLT must hold 3 prompts \(B\), got 2 lengths"),
        ({"tau_list": [1.0]}, "tau_list needs 5 values, one per scale, got 1"),
        ({"cfg_list": [1.0]}, "cfg_list needs 5 values"),
        ({"cfg_insertion_layer": [-5]}, "cfg_insertion_layer must be 0 or -1 ... -4, got -5"),
    ],
)
def test_wrong_arguments_are_named(infinity: OfficialInfinity, changes: dict[str, object], message: str) -> None:
    with fv.attach(infinity), pytest.raises(FoveateError, match=message):
        infinity.autoregressive_infer_cfg(**call(toy("square"), **changes))


def test_default_and_unread_arguments_are_accepted(infinity: OfficialInfinity) -> None:
    subject = toy("square")
    unread = {"gumbel": 1, "cfg_sc": 7, "save_img_path": "x.png", "newer_than_we_are": 0}
    with fv.attach(infinity):
        found = infinity.autoregressive_infer_cfg(**call(subject, **unread))[2]
    assert torch.equal(found, as_bytes(drawn(subject, infinity_request(subject))))


def test_an_autoencoder_of_another_model_is_refused(infinity: OfficialInfinity, var: OfficialVAR) -> None:
    subject = toy("square")
    with fv.attach(infinity):
        infinity.apply_spatial_patchify = 1
        with pytest.raises(FoveateError, match="wants 8 bits a token, vae offers 32 bits a token"):
            infinity.autoregressive_infer_cfg(**call(subject))
        infinity.apply_spatial_patchify = 0
        with pytest.raises(FoveateError, match="z_interplote_up"):
            infinity.autoregressive_infer_cfg(**call(subject, vae=var.vae_proxy[0]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("a path", "got str"),
        (nn.Linear(2, 2), "got Linear: it has neither cfg_uncond nor class_emb.weight"),
        (OfficialAutoencoder(toy("square")), "its weights are autoencoder's"),
    ],
    ids=["no module", "no weights", "autoencoder"],
)
def test_other_objects_are_refused(model: object, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        fv.attach(model)


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_wrapped_objects_are_refused(var: OfficialVAR, wrapper: str) -> None:
    outer = nn.Module()
    outer.add_module(wrapper, var)
    with pytest.raises(UnsupportedError, match=f"below {wrapper}: it is wrapped; give the module inside"):
        fv.attach(outer)


def block(model: OfficialVAR, index: int) -> nn.Module:
    return list(model.blocks.children())[index]


def lose_a_bias(model: OfficialVAR) -> None:
    del block(model, 2).ffn.fc1.bias


def adapt(model: OfficialVAR) -> None:
    block(model, 1).lora_A = nn.Parameter(torch.zeros(2))


def quantise(model: OfficialVAR) -> None:
    model.head.weight = nn.Parameter(model.head.weight.to(torch.int8), requires_grad=False)


def shorten(model: OfficialVAR) -> None:
    model.patch_nums = model.vae_proxy[0].quantize.v_patch_nums = (1, 2, 3)


BROKEN = {
    "OfficialVAR lacks patch_nums": lambda model: delattr(model, "patch_nums"),
    "OfficialVAR lacks uniform_prob": lambda model: delattr(model, "uniform_prob"),
    "rng must be a torch.Generator, got int": lambda model: setattr(model, "rng", 3),
    "1 missing: blocks.2.ffn.fc1.bias": lose_a_bias,
    "1 unknown: blocks.1.lora_A": adapt,
    "blocks.0 of OfficialVAR has forward hooks": lambda model: block(model, 0).register_forward_hook(print),
    "blocks.0.forward of OfficialVAR was replaced": lambda model: setattr(block(model, 0), "forward", print),
    "is on the meta device; load the weights first": lambda model: model.to("meta"),
    "head.weight is on the meta device": lambda model: model.head.to("meta"),
    "head.weight is quantised to torch.int8": quantise,
    "eps must be 1e-06, as published; got 1e-05": lambda model: setattr(model.head_nm.ln_wo_grad, "eps", 1e-5),
    "quant_resi_ratio must be 0.5, as published; got 0.3": lambda model: setattr(
        model.vae_proxy[0].quantize, "quant_resi_ratio", 0.3
    ),
    "patch_nums of the object and of its autoencoder differ": lambda model: setattr(
        model, "patch_nums", (1, 2, 4, 3, 6)
    ),
    "vae_quant_proxy must hold the quantiser of vae_proxy": lambda model: setattr(
        model, "vae_quant_proxy", (nn.Module(),)
    ),
    "not the given one, 1x1 2x2 3x3": shorten,
    "OfficialVAR.vae_proxy must hold one module in a tuple": lambda model: setattr(model, "vae_proxy", ()),
    "does not take B, label_B, g_seed, .*; it is not the official one": lambda model: setattr(model, METHOD, print),
}


@pytest.mark.parametrize("message", BROKEN)
def test_var_objects_that_are_not_what_they_say(var: OfficialVAR, message: str) -> None:
    BROKEN[message](var)
    before = dict(vars(var))
    with pytest.raises(FoveateError, match=message):
        fv.attach(var)
    assert vars(var) == before


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("rope2d_normalized_by_hw", 1, "rope2d_normalized_by_hw must be 2, as published; got 1"),
        ("use_bit_label", 0, "use_bit_label must be 1"),
        ("norm_eps", 1e-5, "norm_eps must be 1e-06"),
        ("unregistered_blocks", [nn.Module()], "Module lacks fused_norm_func"),
    ],
)
def test_infinity_objects_of_other_settings(
    infinity: OfficialInfinity, setting: str, value: object, message: str
) -> None:
    setattr(infinity, setting, value)
    with pytest.raises(FoveateError, match=message):
        fv.attach(infinity)
    delattr(infinity, setting)
    with pytest.raises(FoveateError, match=f"OfficialInfinity lacks {setting}"):
        fv.attach(infinity)
