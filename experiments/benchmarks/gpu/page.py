"""The page of the GPU benchmark, from its figures."""

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["page"]

_HOW = """# Figures on a GPU

`python -m privet.experiments.benchmarks.gpu --out FOLDER` builds models with random weights in the
shapes of SmolLM2-135M, Qwen2.5-0.5B and 1.5B, and Llama-3.2-3B, tries whether the device computes
what privacy rests on, and measures how fast it does. Nothing is downloaded, and after 7 minutes
(`--minutes`) nothing new is begun. FOLDER gets `gpu.json` and this page. Without a GPU the same
script runs through on tiny models, `--device cpu --tiny`; a test does that, and another runs it on
a fake device beside the CPU (`tests/fake_device.py`).

## To a machine without a network
It needs torch 2.11 or later, transformers 5.17 or later and peft there. What else privet imports
for it travels as wheels, 8 MB for Python 3.12, in a folder that git ignores:

```
pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \\
  --platform manylinux2014_x86_64 -d .whl opacus==1.6.0 dp-accounting==0.6.0 \\
  pydantic==2.14.3 pydantic_core==2.50.4 typing-inspection==0.4.5 annotated-types==0.8.0 \\
  cryptography==50.0.2 cffi==2.1.1 pycparser==3.12 platformdirs==4.14.7 tomli_w==1.2.0
```

There, in the folder that holds privet's files and `.whl`:

```
python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl
ln -s "$PWD" /tmp/site/privet
PYTHONPATH=/tmp/site python3 -m privet.experiments.benchmarks.gpu --out "$OUT"
```

Flower is not needed: clients are counted by their step and the gate, without messages.
"""
_NOT_RUN = """
## Not run

There are no figures here, and nothing on this page is a claim about a GPU: {why}.
"""
_CONFORMANCE = """
## Does it compute rightly
The loop over records is autograd, in float32 on the CPU, with the same weights. In bfloat16 the
model itself rounds, block after block, so its gradients may be further away from that than from
those of the same record alone in the same shape.

| model | dtype | what must be small | figure | allowed | |
|---|---|---|---|---|---|
"""
_THROUGHPUT = """
## How fast
LoRA on the usual four layers of every block, {rank} ranks; DP-SGD with a clip for each record. The
share of the ceiling is counted work (linear layers, no attention) over time, against the best
matrix product measured in the same run. `failed` says what did not fit.

| model | rows x tokens | step | tokens a second | share of ceiling | DP over plain | peak memory |
|---|---|---|---|---|---|---|
"""


def page(figures: Mapping[str, Any]) -> str:
    """Write the page of these figures as Markdown; `not run` where no GPU was there."""
    if not figures.get("models"):
        return _HOW + _NOT_RUN.format(why=figures["why"])
    where = f"{figures['device']}, {figures['date']}, " + ", ".join(
        f"{name} {version}" for name, version in figures["versions"].items()
    )
    if not figures["ran"]:
        where = f"**A rehearsal without a GPU**: {where}"
    models = figures["models"]
    return "".join(
        [
            _HOW,
            f"\n{where}.\n",
            _CONFORMANCE,
            *(line for model in models for line in _checks(model)),
            _THROUGHPUT.format(rank=figures["rank"]),
            *(line for model in models for line in _steps(model)),
            *_rest(models),
        ]
    )


def _checks(model: Mapping[str, Any]) -> Iterator[str]:
    for check in model["conformance"]:
        figure = check["why"] if check["figure"] is None else f"{check['figure']:.1e}"
        passed = "passed" if check["passed"] else "**failed**"
        yield (
            f"| {model['name']} | {check['dtype']} | {check['name']} | {figure} | "
            f"{check['allowed']:.0e} | {passed} |\n"
        )


def _steps(model: Mapping[str, Any]) -> Iterator[str]:
    for step in model["throughput"]:
        at_once = step.get("rows_at_once", step["rows"])
        fewer = f" ({at_once} at once)" if at_once < step["rows"] else ""
        size = f"| {model['name']} | {step['rows']} x {step['tokens']}{fewer} |"
        if "failed" in step:
            yield f"{size} failed: {step['failed']} | | | | |\n"
        else:
            yield (
                f"{size} {1000 * step['step_s']:.1f} ms | {step['tokens_per_s']:,.0f} | "
                f"{step['share_of_ceiling']:.3f} | {step['dp_over_plain']:.2f} | "
                f"{step['peak_mb']:,.0f} MB |\n"
            )


def _rest(models: list[Mapping[str, Any]]) -> Iterator[str]:
    rates = {model["name"]: model["clients_per_s"] for model in models if model["clients_per_s"]}
    listed = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    yield f"\nSimulated clients a second, each a step and the gate, one by one: {listed}.\n"
    left_out = [f"{model['name']} ({what})" for model in models for what in model["left_out"]]
    if left_out:
        yield f"\nLeft out, because time was up: {', '.join(left_out)}.\n"
