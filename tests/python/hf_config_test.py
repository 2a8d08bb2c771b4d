#!/usr/bin/env python3
"""Compares RotaryEmbeddingOptions::from_hf_config with transformers, for every class with rotary embedding.

Each configuration is given in full, as transformers saves it, as its model_type alone, and with each scaling plan,
also in the form of older files. Queries and keys are rotated by posenc's options, and by the model's own rotary
module and function; the scores must agree. Scores depend on the frequencies, the pairing, the sign of the angle, the
rotated channels, the axes of the positions and the attention factor.

POSENC_HF_CONFIG_TABLES names the program built from tests/hf_config_tables.cpp. Prints the counts that are committed as
tests/data/hf_config_counts.md.
"""

import collections
import json
import os
import subprocess
import sys
import warnings

ALL_SKIPPED = 77  # exit status that ctest reports as skipped

warnings.filterwarnings("ignore")

try:
    import torch
    import transformers
except ImportError as error:
    print(f"skipped: {error}; ./dev hf-configs installs what this test needs")
    sys.exit(ALL_SKIPPED)

VERSION = "5.24"  # modules/detail/hf_models.json has the defaults of this release
if not transformers.__version__.startswith(VERSION + "."):
    print(f"skipped: expected transformers {VERSION}, got {transformers.__version__}; ./dev hf-configs installs it")
    sys.exit(ALL_SKIPPED)

import hf_config_oracle as oracle

transformers.logging.set_verbosity_error()

LENGTH = 40  # tokens

# Errors of from_hf_config that are right: a part of the message, and the reason.
FAIR_ERRORS = [
    ("which are not rotated", "a layer without rotary embedding"),
    ("expected a model with rotary embedding", "a model without rotary embedding"),
    ("expected a model whose rotary embedding the options can express", "a rotation that the options cannot express"),
    ("expected an mrope_section that adds up", "sections that do not fit the head, with which transformers fails too"),
    ("expected an even number of rotated channels", "an odd number of rotated channels"),
    ("expected a hidden_size that num_attention_heads divides", "a head of a fraction of a channel"),
]

PLANS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "alpha": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 20},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
}


def rotate(x, answer, positions):
    """x, [S, D], rotated in float64 by the options in `answer`, a line that the program printed."""
    frequencies = answer["frequencies"][0]
    inv_freq = torch.tensor(frequencies["inv_freq"], dtype=torch.float64)
    axes = answer["pair_axes"] or [0] * len(inv_freq)
    positions = torch.as_tensor(positions)
    angles = positions[[axis if axis < len(positions) else 0 for axis in axes]].T.double() * inv_freq
    cos = angles.cos() * frequencies["attention_factor"]
    sin = angles.sin() * frequencies["attention_factor"] * (-1 if answer["conjugate"] else 1)
    width = answer["rotary_dim"]
    if answer["interleaved"]:
        first, second = slice(0, width, 2), slice(1, width, 2)
    else:
        first, second = slice(0, width // 2), slice(width // 2, width)
    x = x.double()
    y = x.clone()
    y[:, first] = x[:, first] * cos - x[:, second] * sin
    y[:, second] = x[:, second] * cos + x[:, first] * sin
    return y


class Case:
    """One configuration in one form, for layers of one type."""

    def __init__(self, form, config, written, layer_type):
        self.form = form
        self.config = config  # the text model's configuration in transformers
        self.written = written  # the argument of from_hf_config
        self.layer_type = layer_type
        self.name = f"{type(config).__name__}, {form}" + ("" if layer_type is None else f", {layer_type}")

    def question(self):
        return {"config": self.written, "layer_type": self.layer_type, "lengths": [LENGTH]}

    def check(self, answer):
        """Returns 'right', the reason of an error that is right, or a line that begins with 'wrong'."""
        try:
            model = oracle.Oracle(self.config, self.layer_type)
            expected = None
        except oracle.NotRotated as error:
            model, expected = None, str(error)
        except oracle.NoOracle as error:
            model, expected = None, str(error)
        if "error" in answer:
            reasons = [reason for text, reason in FAIR_ERRORS if text in answer["error"]]
            if not reasons:
                return f"wrong: {answer['error']}"
            if model is not None and "transformers fails too" in reasons[0]:
                self.inputs(model)  # raises oracle.Fails if transformers fails too
                return f"wrong: transformers rotates, but {answer['error']}"
            if model is not None and not reasons[0].startswith(MAY_HAVE_ORACLE):
                return f"wrong: transformers rotates, but {answer['error']}"
            return reasons[0]
        if model is None:
            return f"wrong: options where transformers has none: {expected}"
        return self.compare(model, answer)

    def inputs(self, model):
        """Random queries, keys and positions, and the scores that transformers computes from them."""
        generator = torch.Generator().manual_seed(20210420)
        q, k = (torch.randn(LENGTH, model.head_dim(), generator=generator) for _ in range(2))
        positions = torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(model.num_axes)])
        return q, k, positions, model.scores(q, k, positions)

    def compare(self, model, answer):
        head_dim = model.head_dim()
        if answer["head_dim"] != head_dim:
            return f"wrong: head_dim {answer['head_dim']} instead of {head_dim}"
        q, k, positions, expected = self.inputs(model)
        got = rotate(q, answer, positions) @ rotate(k, answer, positions).T
        # transformers computes angles (below LENGTH) in float32 from frequencies with a few roundings. A score sums
        # head_dim products, whose errors of about LENGTH 2^-22 add up like a random walk.
        tolerance = 8 * LENGTH * 2.0**-22 * head_dim**0.5 * max(1.0, answer["frequencies"][0]["attention_factor"] ** 2)
        difference = (expected - got).abs().max().item()
        if difference <= tolerance:
            return "right"
        return f"wrong: scores differ by {difference:.3g}, {answer['scaling']}, base {answer['base']}"


# Reasons for which from_hf_config may refuse a model that transformers rotates.
MAY_HAVE_ORACLE = ("a rotation that", "an odd", "a head of")


def saved(config):
    return json.loads(config.to_json_string(use_diff=True))


def nested_forms(cls, config):
    """(form, configuration, argument of from_hf_config) of a class."""
    yield "full", config, json.loads(config.to_json_string(use_diff=False))
    yield "saved", config, saved(config)
    yield "minimal", config, {"model_type": cls.model_type}


def with_parameters(cls, parameters, **fields):
    """A configuration with these rope_parameters, or None if the class refuses them."""
    try:
        return cls(rope_parameters=json.loads(json.dumps(parameters)), **fields)
    except Exception:
        return None


def plan_forms(cls, config):
    """The same with each scaling plan and, if all layers share their parameters, in the form of older files."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or any(value is None for value in parameters.values()):
        return
    if parameters.get("rope_type") == "axial":
        return  # transformers has no scaling plans for axial rotation
    nested = any(isinstance(value, dict) for value in parameters.values())
    for name, plan in PLANS.items():
        if (name == "alpha") != type(config).__name__.startswith("HunYuan") and name in ("alpha", "dynamic"):
            continue  # HunYuan's dynamic plan is the one by alpha
        def planned_for(layer_type, values):
            """`values` with the fields of this plan instead of those of the default plan."""
            changed = {key: value for key, value in values.items() if key not in ALL_PLAN_FIELDS}
            if values.get("rope_type") == "proportional":  # its partial_rotary_factor has another meaning
                changed.pop("partial_rotary_factor", None)
            changed.update(plan)
            if name == "longrope":
                pairs = len(oracle.Oracle(config, layer_type).inv_freq())
                changed["short_factor"] = [1.0 + 0.01 * i for i in range(pairs)]
                changed["long_factor"] = [1.0 + 0.5 * i for i in range(pairs)]
            return changed

        theta = None if nested else parameters.get("rope_theta")
        try:
            if nested:
                changed = {key: planned_for(key, value) for key, value in parameters.items()}
            else:
                changed = planned_for(oracle.layer_types_of(config)[-1], parameters)
        except (oracle.NotRotated, oracle.NoOracle, oracle.Fails):
            continue
        fields = {"max_position_embeddings": 20} if name == "dynamic" else {}
        if "head_dim" in getattr(cls, "__dataclass_fields__", {}) and not config.is_heterogeneous:
            if config.head_dim is None:
                fields["head_dim"] = 128  # the plans of some classes fail without head_dim
        planned = with_parameters(cls, changed, **fields)
        if planned is None:
            continue
        yield name, planned, saved(planned)
        if not nested:
            old = {k: v for k, v in saved(planned).items() if k != "rope_parameters"}
            old["rope_scaling"] = {
                "type" if k == "rope_type" else k: v for k, v in changed.items() if k != "rope_theta"
            }
            if theta is not None:
                old["rope_theta"] = theta
            yield f"{name}, old", planned, old


ALL_PLAN_FIELDS = {
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "llama_4_scaling_beta",
    "low_freq_factor",
    "high_freq_factor",
    "alpha",
}


def cases(plans):
    for _, cls in oracle.configuration_classes():
        try:
            config = cls()
        except Exception:
            continue  # it has required arguments
        if not cls.model_type:
            continue  # a part of another configuration, which no file has alone
        inner = oracle.text_config_of(config)
        if inner is config:
            yield from layered_cases(cls, config)
        for form, _, written in nested_forms(cls, config):
            for layer_type in oracle.layer_types_of(inner):
                yield Case(form, inner, written, layer_type)
        if inner is config and plans:
            for form, planned, written in plan_forms(cls, config):
                for layer_type in oracle.layer_types_of(planned):
                    yield Case(form, planned, written, layer_type)


def layered_cases(cls, config):
    """Cases with a layer of each type in rope_parameters, if the default layer_types of a class lack some."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [key for key, value in parameters.items() if isinstance(value, dict)]
    if not kinds or set(kinds) <= set(getattr(config, "layer_types", None) or kinds):
        return
    try:
        config = cls(layer_types=kinds, num_hidden_layers=len(kinds))
    except Exception:
        return
    for layer_type in kinds:
        yield Case("layers", config, saved(config), layer_type)


def write_expected(checked):
    """Prints tests/data/hf_models.h: options from each model_type alone that agreed with transformers."""
    print("#pragma once\n\n// Written by tests/python/hf_config_test.py --expected; not by hand. transformers", end=" ")
    print(f"{transformers.__version__}.\n\n#include <cstdint>\n\nnamespace posenc::test::data {{\n")
    print("/// The options of `{\"model_type\": ...}` alone. `axes` has a digit for each pair.\nstruct HfModel {")
    print("  const char* model_type;\n  const char* layer_type;\n  int64_t head_dim;\n  int64_t rotary_dim;")
    print("  double base;\n  const char* pairing;\n  const char* scaling;\n  const char* axes;\n};\n")
    print("// clang-format off\ninline const HfModel kHfModels[] = {")
    errors = {}
    seen = set()
    for case, answer, result in checked:
        key = (case.written.get("model_type"), case.layer_type)
        if set(case.written) != {"model_type"} or key in seen:
            continue
        layer_type = "nullptr" if case.layer_type is None else json.dumps(case.layer_type)
        if "error" in answer:
            errors[key] = next((text for text, _ in FAIR_ERRORS if text in answer["error"]), answer["error"])
        elif result == "right":
            seen.add(key)
            pairing = "interleaved" if answer["interleaved"] else "conjugate" if answer["conjugate"] else "half"
            axes = "".join(str(axis) for axis in answer["pair_axes"])
            print(
                f'    {{"{key[0]}", {layer_type}, {answer["head_dim"]}, {answer["rotary_dim"]}, {answer["base"]:.17g}, '
                f'"{pairing}", "{answer["scaling"]}", "{axes}"}},'
            )
    print("};\n\n/// Those that are refused, and a part of the message.\nstruct HfModelError {")
    print("  const char* model_type;\n  const char* layer_type;\n  const char* message;\n};\n")
    print("inline const HfModelError kHfModelErrors[] = {")
    for (model_type, layer_type), text in errors.items():
        print(f'    {{"{model_type}", {"nullptr" if layer_type is None else json.dumps(layer_type)}, "{text}"}},')
    print("};\n// clang-format on\n\n}  // namespace posenc::test::data")


def main():
    every = [case for case in cases("--expected" not in sys.argv) if oracle.may_be_rotary(case.config)]
    lines = "\n".join(json.dumps(case.question()) for case in every) + "\n"
    program = subprocess.run(
        [os.environ["POSENC_HF_CONFIG_TABLES"]], input=lines, stdout=subprocess.PIPE, text=True, check=True
    )
    answers = [json.loads(line) for line in program.stdout.splitlines()]
    assert len(answers) == len(every), f"{len(every)} questions, {len(answers)} answers"
    counts = collections.Counter()
    wrong = []
    results = []
    for case, answer in zip(every, answers):
        try:
            result = case.check(answer)
        except oracle.Fails as error:
            result = "transformers' own module fails"
        if "-v" in sys.argv and result != "right":
            print(f"{case.name}: {result}", file=sys.stderr)
        if result.startswith("wrong"):
            wrong.append(f"{case.name}: {result}")
            result = "wrong"
        results.append(result)
        counts[result] += 1
    for line in wrong:
        print(line, file=sys.stderr)
    if "--expected" in sys.argv:
        write_expected(zip(every, answers, results))
        return 1 if wrong else 0
    classes = len({type(case.config) for case in every})
    print(f"from_hf_config beside transformers {transformers.__version__}: {classes} configuration classes\n")
    print("| result | cases |\n|---|---|")
    print(f"| right | {counts.pop('right', 0)} |\n| wrong | {counts.pop('wrong', 0)} |")
    for reason, count in sorted(counts.items()):
        print(f"| {'' if reason.startswith('transformers') else 'error: '}{reason} | {count} |")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
