"""The models that clients can ask for, by what they call them: name and version."""

from collections.abc import Collection, Mapping

from serve_app.errors import Unavailable, UnknownModel
from serve_app.ingress.batched import BatchedModels
from serve_app.ingress.hub import Hub
from serve_app.ingress.model_control import ModelControl
from serve_app.rows import BatchedSpec
from serve_app.spec import ONLY_VERSION, ModelSpec, newest_first, split_name

Spec = ModelSpec | BatchedSpec


class Catalog:
    """As it was at the last `look`. Who asks for no version means the newest that can be asked.

    `specs`: by what they are served as (see spec.split_name), also of those that were unloaded since. `unloaded`: see
    ModelControl.unloaded. What has gone for another reason can still be asked: its sessions wait for who comes instead.
    """

    def __init__(self, hub: Hub, batched: BatchedModels, control: ModelControl) -> None:
        self._hub, self._batched, self._control = hub, batched, control
        self.specs: dict[str, Spec] = {}
        self.unloaded: Mapping[str, bool] = {}
        self._seen: dict[str, Spec] = {}
        self._known: dict[str, Spec] = {}

    async def look(self) -> bool:
        """See what there is now; whether that is other than before."""
        batched = {name: spec for name, spec in self._batched.specs().items() if spec is not None}
        unloaded = await self._control.unloaded()
        kept = {name: spec for name, spec in self.specs.items() if name in unloaded}
        specs = {**kept, **await self._hub.models(), **batched}
        if (specs, unloaded) == (self.specs, self.unloaded):
            return False
        self.specs, self.unloaded = specs, unloaded
        self._seen |= specs
        only = {f"{name}@{ONLY_VERSION}": spec for name, spec in self._seen.items() if "@" not in name}
        self._known = {**self._newest(), **only, **self._seen}
        return True

    def find(self, model: str, version: str) -> Spec | None:
        """The model of that name; version: "" for none in particular."""
        return self._known.get(f"{model}@{version}" if version else model)

    def get(self, model: str, version: str) -> Spec:
        """As `find`. Raises UnknownModel, Unavailable for one that is configured, and has no replica now."""
        spec = self.find(model, version)
        if spec is None and self._names(model, version, self.configured):
            raise Unavailable(f"no replica of model '{model}'{_of(version)} is ready: try again in a moment")
        if spec is None:
            raise _unknown(model, version)
        return spec

    def names(self, model: str, version: str = "") -> list[str]:
        """What all that is meant is served as, the newest first: without a version all. Raises UnknownModel."""
        found = self._names(model, version, {*self.configured, *self.specs, *self.unloaded})
        if not found:
            raise _unknown(model, version)
        return found

    @property
    def configured(self) -> Collection[str]:
        """What all models are served as, whether they can be asked now or not."""
        return {*self._batched.specs(), *self._control.configured}

    def _names(self, model: str, version: str, names: Collection[str]) -> list[str]:
        if model in names and (not version or (version == ONLY_VERSION and "@" not in model)):
            return [model]
        found = newest_first(model, names)
        return [name for name in found if version in ("", split_name(name)[1])]

    def _newest(self) -> dict[str, Spec]:
        """Of each model with versions the newest; one that is unloaded, or gone, only where no other is better."""
        versions = {model: newest_first(model, self._seen) for model in {split_name(name)[0] for name in self._seen}}
        return {
            model: self._seen[min(names, key=lambda name: (name in self.unloaded, name not in self.specs))]
            for model, names in versions.items()
            if names
        }


def _unknown(model: str, version: str) -> UnknownModel:
    return UnknownModel(f"Request for unknown model: '{model}'{_of(version)} is not found")


def _of(version: str) -> str:
    return f" version {version}" if version not in ("", ONLY_VERSION) else ""
