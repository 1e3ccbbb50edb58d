"""What does the chart of deploy/k8s make of values? Rendered as Helm does, without Helm."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from gotpl.errors import TemplateExecutionError
from gotpl.exts.helm import HelmTemplateEngine

FOLDER = Path(__file__).parents[3] / "deploy/k8s"
CHART = FOLDER / "headway"
EXAMPLES = sorted((FOLDER / "examples").glob("*.yaml"))
TEMPLATES = sorted((CHART / "templates").iterdir())
RELEASE = {"Name": "test", "Namespace": "llm", "Service": "Helm", "Revision": 1}

Values = dict[str, Any]


class CannotRender(Exception):
    """What Helm would print instead of manifests."""


def render(values: Values) -> list[Values]:
    """Return the manifests. Raise `CannotRender` for values that the chart refuses."""
    return [each for text in _texts(json.dumps(values)) for each in _documents(text)]


def _documents(text: str) -> list[Values]:
    loaded = yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return [each for each in loaded if each is not None]


@cache
def _texts(values: str) -> list[str]:
    """Return what each template becomes."""
    merged = merge(read(CHART / "values.yaml"), json.loads(values))
    try:
        jsonschema.validate(merged, json.loads((CHART / "values.schema.json").read_text()))
    except jsonschema.ValidationError as error:
        raise CannotRender(f"{'.'.join(map(str, error.path))}: {error.message}") from None
    chart = {key[0].upper() + key[1:]: value for key, value in read(CHART / "Chart.yaml").items()}
    context = {"Values": merged, "Release": RELEASE, "Chart": chart}
    names = [path.name for path in TEMPLATES if path.suffix == ".yaml"]
    try:
        texts = _engine().render(dict.fromkeys([*names, "NOTES.txt"], context))
    except TemplateExecutionError as error:
        raise CannotRender(str(error)) from None
    return [texts[name] for name in names]


@cache
def _engine() -> HelmTemplateEngine:
    sources = {path.name: path.read_text() for path in TEMPLATES}
    return HelmTemplateEngine(sources, strict=True)  # a name that is missing is an error


def merge(base: Values, over: Values) -> Values:
    """Return `base` with the values in `over`; mappings are merged, all else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def read(path: Path) -> Values:
    return yaml.safe_load(path.read_text())
