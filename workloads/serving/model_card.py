"""Writes the model card of an export (`write_card`): model, data, files and how to load them, figures, limits, configuration."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_INPUT = "NCHW, RGB, [0, 1], then (x − {mean}) / {std}; trained on {size} pixels, other sizes work too"
_LOADING = {
    "torchvision": (
        "`torchvision.models.{name}()`, `strict=True`; the classifier is of zeros, so replace `fc` or take features",
        'model = torchvision.models.{name}({norm})\nmodel.load_state_dict(torch.load("{file}", weights_only=True))',
    ),
    "torchvision_fpn": (
        "`resnet_fpn_backbone`, `strict=True`; its pyramid is freshly initialised, as torchvision does it",
        'backbone = resnet_fpn_backbone(backbone_name="{name}", weights=None{more_norm})\n'
        'backbone.load_state_dict(torch.load("{file}", weights_only=True))',
    ),
    "torchvision_pyramid": (
        "`BackboneWithFPN` over C3 to C5 with the pyramid that this run trained, `strict=True`",
        'layers = {{"layer2": "0", "layer3": "1", "layer4": "2"}}\n'
        "backbone = BackboneWithFPN(torchvision.models.{name}({norm}), layers, {widths}, {channels})\n"
        'backbone.load_state_dict(torch.load("{file}", weights_only=True))',
    ),
    "timm": (
        '`timm.create_model("{name}", num_classes=0)`, `strict=True`',
        'model = timm.create_model("{name}", num_classes=0{timm_norm})\n'
        'model.load_state_dict(torch.load("{file}", weights_only=True))',
    ),
    "safetensors": (
        "the same tensors and names as timm's; the header holds the metadata",
        'model.load_state_dict(safetensors.torch.load_file("{file}"))',
    ),
    "onnx": (
        "opset of torch's exporter; any batch, sides that are multiples of 32",
        'c2, c3, c4, c5 = onnxruntime.InferenceSession("{file}").run(None, {{"images": images}})',
    ),
    "torch_export": (
        "any batch, sides that are multiples of 32",
        'c2, c3, c4, c5 = torch.export.load("{file}").module()(images)',
    ),
}


def write_card(
    folder: Path,
    *,
    title: str,
    described: Mapping[str, Any],
    config: Any,
    metrics: Mapping[str, float],
    licence: str | None,
    source: Mapping[str, str],
    channels: int | None,
) -> Path:
    """Write `README.md` into `folder`.

    Args:
        described: what `export.metadata` returned.
        metrics: key → value; `x_low` and `x_high` are the interval of `x`.
        source: name → origin, as run id and data hash.
        channels: channels of the run's own pyramid, where its file was written.
    """
    name, files = described["architecture"], described["files"]
    group = described["norm"] == "group"
    norm = "norm_layer=lambda c: torch.nn.GroupNorm(32, c)" if group else ""
    widths = [stage["channels"] for stage in list(described["outputs"].values())[1:]]
    lines = [
        f"# {title}",
        "",
        f"A {name} ({described['norm']} norm), pretrained without labels or fine-tuned, by the configuration below.",
        "",
    ]
    lines += ["| | |", "| --- | --- |", *(f"| {what} | `{value}` |" for what, value in source.items())]
    lines += [f"| licence | {licence or 'not stated; the images that it was trained on have their own terms'} |", ""]
    given = described["input"]
    lines += ["## Input", "", _INPUT.format(mean=given["mean"], std=given["std"], size=given["size"][0]) + ".", ""]
    lines += ["## Files", ""]
    for purpose, (meaning, code) in _LOADING.items():
        if purpose in files:
            values = {
                "name": name, "file": files[purpose], "norm": norm, "more_norm": f", {norm}" if norm else "",
                "timm_norm": ', norm_layer="groupnorm"' if group else "", "widths": widths, "channels": channels,
            }  # fmt: skip
            lines += [f"- `{files[purpose]}`: {meaning.format(**values)}", "", "  ```python"]
            lines += [f"  {line}" for line in code.format(**values).splitlines()] + ["  ```", ""]
    lines += ["## Measured", "", *_table(metrics), ""]
    lines += [
        "## Limits",
        "",
        *_limits(metrics),
        "",
        "## Configuration",
        "",
        "```yaml",
        yaml.safe_dump(config, sort_keys=False, width=120, allow_unicode=True).rstrip(),
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    return folder / "README.md"


def _table(metrics: Mapping[str, float]) -> list[str]:
    ends = ("_low", "_high")
    rows = sorted(k for k, v in metrics.items() if k.startswith("eval/") and not k.endswith(ends) and math.isfinite(v))
    if not rows:
        return ["No evaluation on held-out images was run."]
    lines = ["| metric | value | 95 % interval over images |", "| --- | --- | --- |"]
    for key in rows:
        low, high = (metrics.get(key + end) for end in ends)
        interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        lines.append(f"| `{key}` | {metrics[key]:.4f} | {interval} |")
    return lines


def _limits(metrics: Mapping[str, float]) -> list[str]:
    limits = [
        "- Trained on the images of the dataset above only; it was not measured on other kinds of images.",
        "- Its embeddings reflect the content of those images, including the choices and biases of those who collected them.",
        "- Embeddings are compared by cosine; a similarity is no probability.",
    ]
    if "eval/pixel" in metrics and "eval/sga" in metrics:
        sga, pixel = metrics["eval/sga"], metrics["eval/pixel"]
        limits.append(
            f"- The colour-statistics baseline, without any learning, finds {pixel:.1%} of the plain queries; this model {sga:.1%}."
        )
    if not any(key.startswith("eval/") for key in metrics):
        limits.append("- Its quality is unknown: no evaluation was run.")
    return limits
