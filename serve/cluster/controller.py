"""The controller: makes what runs what the Models say, again and again, from whatever state it finds."""

from __future__ import annotations

import datetime
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from serve.applications import application_name
from serve.cluster.crd import GROUP, KIND, VERSION
from serve.cluster.kube import ApiUnavailable, Cluster, Conflict, Missing, Refused
from serve.cluster.leader import RENEW_S, Leadership
from serve.cluster.resource import Declared, Observed, changes, desired, is_gone, read, status_of, status_without_ray
from serve.cluster.targets import Target, TargetUnavailable
from serve.errors import RoundhouseError

logger = logging.getLogger("roundhouse.controller")

_BUSY_S = 2.0
_SETTLED_S = 15.0
# What a watch has lost is found by the next list.
_LIST_S = 600.0
_LONGEST_BACKOFF_S = 60.0
_TOLD = {"Accepted": "False", "Degraded": "True", "Ready": "True"}


class ControllerBroken(RoundhouseError):
    """A thread that the controller cannot do without has ended."""


class NotLeading(Exception):
    """Another controller acts now, or may: nothing is written."""


class Store:
    """The Models as lists and the watch have told them, never an older one in place of a newer."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, Any]] = {}
        # A Model's uid -> the version at which it was gone: it never comes back, though older news of it may.
        self._gone: dict[str, str] = {}
        self._listed = ""
        self._read: dict[tuple[str, int, bool], Declared] = {}
        self._lock = threading.Lock()
        self.synced = threading.Event()
        self.changed = threading.Event()

    def replace(self, models: list[dict[str, Any]], version: str) -> None:
        """Take a whole list, but for what is known at a newer version than its own."""
        with self._lock:
            if _is_older(version, self._listed):
                # Of an API server that was restored from a backup each list is older, until this process starts anew.
                logger.warning("the Models listed at version %s are left, as %s is known", version, self._listed)
            else:
                self._take(models, version)
        self.synced.set()
        self.changed.set()

    def _take(self, models: list[dict[str, Any]], version: str) -> None:
        listed = {model["metadata"]["name"]: model for model in models if model["metadata"]["uid"] not in self._gone}
        for name, known in self._models.items():
            at = listed[name]["metadata"]["resourceVersion"] if name in listed else version
            if _is_older(at, known["metadata"]["resourceVersion"]):
                listed[name] = known
        self._gone = {uid: at for uid, at in self._gone.items() if not _is_older(at, self._listed)}
        stays = {model["metadata"]["uid"] for model in listed.values()}
        went = {known["metadata"]["uid"] for known in self._models.values()} - stays
        self._gone |= dict.fromkeys(went, version)
        self._models, self._listed = listed, version

    def put(self, model: Mapping[str, Any], *, gone: bool = False) -> None:
        """Take one change."""
        metadata = model["metadata"]
        name, uid, version = metadata["name"], metadata["uid"], metadata["resourceVersion"]
        with self._lock:
            known = self._models.get(name, model)["metadata"]
            if uid in self._gone or (known["uid"] == uid and _is_older(version, known["resourceVersion"])):
                return
            if gone:
                self._gone[uid] = version
                if known["uid"] == uid:
                    self._models.pop(name, None)
            else:
                if known["uid"] != uid:
                    self._gone[known["uid"]] = version
                self._models[name] = dict(model)
        self.changed.set()

    def declared(self) -> list[Declared]:
        """Return every Model, read; one that has not changed is not read again."""
        with self._lock:
            models = list(self._models.values())
        found, kept = [], {}
        for model in models:
            metadata = model["metadata"]
            key = (metadata["uid"], metadata.get("generation", 0), "deletionTimestamp" in metadata)
            before = self._read.get(key)
            fresh = read(model) if before is None else _updated(before, model)
            kept[key] = fresh
            found.append(fresh)
        self._read = kept
        return found


def _is_older(one: str, other: str) -> bool:
    return one.isdigit() and other.isdigit() and int(one) < int(other)


def _updated(before: Declared, model: Mapping[str, Any]) -> Declared:
    return Declared(
        name=before.name,
        generation=before.generation,
        version=model["metadata"]["resourceVersion"],
        spec=before.spec,
        problem=before.problem,
        deleting=before.deleting,
        finalizers=tuple(model["metadata"].get("finalizers", ())),
        status=model.get("status", {}),
        uid=before.uid,
    )


@dataclass(slots=True)
class Counters:
    """What the controller has done, for its metrics."""

    passes: int = 0
    errors: int = 0
    applied: int = 0
    statuses: int = 0
    seconds: float = 0.0
    last_turn: float = 0.0
    phases: dict[str, int] = field(default_factory=dict)


class Controller:
    """One controller process.

    Args:
        cluster: Where the Models are.
        target: Where they run.
        leadership: Whether this process may write.
        gateway_replicas: As in `serve_config`.
        public_url: Of the inference service.
        clock: Seconds, monotonic.
        now: The time of day.
    """

    def __init__(
        self,
        cluster: Cluster,
        target: Target,
        leadership: Leadership,
        *,
        gateway_replicas: int,
        public_url: str,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self._cluster = cluster
        self._target = target
        self._leadership = leadership
        self._gateway_replicas = gateway_replicas
        self._public_url = public_url
        self._clock = clock
        self._now = now
        self.store = Store()
        self.counters = Counters()
        # Model -> its version whose refusal was told.
        self._refused: dict[str, str] = {}
        self._stop = threading.Event()
        self._broken = ""

    # Threads

    def run(self) -> None:
        """Work until `stop`; then give the lease up.

        Raises:
            ControllerBroken: A thread ended by an error that nobody foresaw; another process should take over.
        """
        for name, work in (("watch", self.watch), ("lease", self._keep_lease)):
            threading.Thread(target=self._guarded, args=(name, work), name=name, daemon=True).start()
        failures = 0
        while not self._stop.is_set():
            self.counters.last_turn = self._clock()
            wait_s = _BUSY_S
            self.store.changed.clear()
            if self.store.synced.is_set() and self._leadership.holds:
                try:
                    settled = self.reconcile()
                    wait_s, failures = (_SETTLED_S if settled else _BUSY_S), 0
                except NotLeading:
                    logger.warning("another controller has taken over")
                except Exception as error:
                    failures += 1
                    self._back_off(error, failures)
                    continue
            self._pause(wait_s)
        try:
            self._leadership.give_up()
        except (ApiUnavailable, Conflict, Missing) as error:
            logger.warning("the lease runs out by itself: %s", error)
        if self._broken:
            raise ControllerBroken(self._broken)

    def _back_off(self, error: Exception, failures: int) -> None:
        self.counters.errors += 1
        wait_s = min(_LONGEST_BACKOFF_S, 2.0 ** min(failures, 6)) * random.uniform(0.5, 1.0)
        unforeseen = not isinstance(error, (ApiUnavailable, TargetUnavailable))
        logger.log(
            logging.ERROR if unforeseen else logging.WARNING,
            "%s; trying again in %.0f s",
            f"a pass ended by {type(error).__name__}: {error}" if unforeseen else error,
            wait_s,
            exc_info=error if unforeseen else None,
        )
        self._stop.wait(wait_s)

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            logger.exception("the %s thread ended", name)
            self._broken = f"the {name} thread ended: {type(error).__name__}: {error}"
            self.stop()

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stop.set()
        self.store.changed.set()

    def _pause(self, seconds: float) -> None:
        """Wait for a change, at most so long; a moment more, so that what changes together is seen together."""
        if self.store.changed.wait(seconds):
            self._stop.wait(0.2)

    def watch(self) -> None:
        """Keep the store up to date until `stop`."""
        while not self._stop.is_set():
            try:
                models, version = self._cluster.list_models()
                self.store.replace(models, version)
                self._follow(version, until=self._clock() + _LIST_S)
            except Conflict:
                self._stop.wait(random.uniform(0.1, 0.5))
            except (ApiUnavailable, Missing) as error:
                logger.warning("%s; listing again", error)
                self._stop.wait(random.uniform(1.0, 3.0))

    def _follow(self, version: str, *, until: float) -> None:
        while not self._stop.is_set() and self._clock() < until:
            for change in self._cluster.watch_models(version):
                version = change.model["metadata"]["resourceVersion"]
                if change.kind != "BOOKMARK":
                    self.store.put(change.model, gone=change.kind == "DELETED")

    def _keep_lease(self) -> None:
        held = False
        while not self._stop.is_set():
            try:
                holds = self._leadership.renew()
            except ApiUnavailable as error:
                holds = self._leadership.holds
                logger.warning("the lease could not be renewed: %s", error)
            except Missing:
                holds = False
                logger.warning("there is no Lease to hold, so nobody acts; a `helm upgrade` makes it again")
            if holds != held:
                held = holds
                logger.info("this controller acts" if holds else "another controller acts; waiting")
                self.store.changed.set()
            self._stop.wait(RENEW_S)

    # One pass

    def reconcile(self) -> bool:
        """Do once what is to be done; return whether nothing more is expected to change by itself.

        Raises:
            NotLeading: Another acts; what was written so far stands, and is right.
            ApiUnavailable, TargetUnavailable: To be tried again.
        """
        began = time.perf_counter()
        try:
            declared = self.store.declared()
            observed = self._observe(declared)
            models = [model for model in declared if self._hold(model, observed)]
            config = desired(models, observed, gateway_replicas=self._gateway_replicas, now=self._now().timestamp())
            changed = changes(config, observed)
            refusal = self._apply(config, changed) if changed else None
            self._release(models, observed)
            self._tell(declared, observed, changed, refusal)
            if refusal:
                raise refusal
            return not changed and all(map(_is_settled, models))
        finally:
            self.counters.passes += 1
            self.counters.seconds += time.perf_counter() - began

    def _observe(self, declared: list[Declared]) -> Observed:
        try:
            return self._target.observe()
        except TargetUnavailable as error:
            for model in self._as_decided_on(declared):
                now = self._written_now()
                self._tell_one(model, status_without_ray(model, str(error), now=now), now)
            raise

    def _apply(self, config: Mapping[str, Any], changed: set[str]) -> TargetUnavailable | None:
        """Tell Ray; return why that was not possible."""
        self._may_write()
        try:
            self._target.apply(config)
        except TargetUnavailable as error:
            return error
        self.counters.applied += 1
        logger.info("told Ray of %s", _some(changed))
        return None

    def _written_now(self) -> str:
        return self._now().strftime("%Y-%m-%dT%H:%M:%SZ")

    def _may_write(self) -> None:
        if not self._leadership.holds:
            raise NotLeading

    def _hold(self, model: Declared, observed: Observed) -> bool:
        """See to it that a Model outlives its application; return whether that may be begun, or goes on."""
        if model.is_held or model.deleting:
            return True
        held = self._write(model, partial(self._cluster.hold, model.name, version=model.version))
        return held or not is_gone(model, observed)

    def _release(self, models: list[Declared], observed: Observed) -> None:
        for model in models:
            if model.is_held and model.deleting and is_gone(model, observed):
                # The answer is not kept: the Model may be gone by now, and its going known already.
                self._write(model, partial(self._cluster.release, model.name, version=model.version), keep=False)

    def _tell(
        self, declared: list[Declared], observed: Observed, changed: set[str], refusal: TargetUnavailable | None
    ) -> None:
        now = self._written_now()
        phases: dict[str, int] = {}
        for model in self._as_decided_on(declared):
            status = status_of(model, observed, public_url=self._public_url, now=now)
            phases[status["phase"]] = phases.get(status["phase"], 0) + 1
            application = application_name(model.name)
            if refusal and application in changed:
                status = status_without_ray(model, str(refusal), now=now)
            elif application in changed & observed.applications.keys():
                continue  # of what Ray has just been told it has said nothing yet
            self._tell_one(model, status, now)
        self.counters.phases = phases

    def _tell_one(self, model: Declared, status: dict[str, Any], now: str) -> None:
        write = partial(self._cluster.write_status, model.name, status, version=model.version)
        if status != model.status and self._write(model, write):
            self.counters.statuses += 1
            self._emit(model, status, now)

    def _as_decided_on(self, declared: list[Declared]) -> list[Declared]:
        """Return the Models at their newest versions, without those whose declaration is no longer the pass's."""
        newest = {model.name: model for model in self.store.declared()}
        found = ((model, newest.get(model.name)) for model in declared)
        return [new for old, new in found if new is not None and _declares_the_same(old, new)]

    def _write(self, model: Declared, write: Callable[[], dict[str, Any]], *, keep: bool = True) -> bool:
        """Write one Model; where it is another by now, leave it to the pass that its change will bring."""
        self._may_write()
        try:
            answer = write()
        except (Conflict, Missing):
            return False
        except Refused as error:
            self.counters.errors += 1
            if self._refused.get(model.name) != model.version:
                self._refused[model.name] = model.version
                logger.warning("%s", error)
            return False
        if keep:
            self.store.put(answer)
        return True

    def _emit(self, model: Declared, status: Mapping[str, Any], now: str) -> None:
        """Tell of conditions that changed to what people want to know of; an Event that is lost harms nobody."""
        before = {condition["type"]: condition["status"] for condition in model.status.get("conditions", ())}
        for condition in status["conditions"]:
            wanted = _TOLD.get(condition["type"])
            if condition["status"] == wanted and before.get(condition["type"]) != wanted:
                try:
                    self._cluster.emit(_event(model, condition, now))
                except (ApiUnavailable, Conflict, Missing) as error:
                    logger.warning("an Event was lost: %s", error)


def _some(names: set[str]) -> str:
    first = sorted(names)[:10]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def _declares_the_same(old: Declared, new: Declared) -> bool:
    return (old.uid, old.generation, old.deleting) == (new.uid, new.generation, new.deleting)


def _is_settled(model: Declared) -> bool:
    conditions = {condition["type"]: condition["status"] for condition in model.status.get("conditions", ())}
    return not model.deleting and conditions.get("Progressing") == "False"


def _event(model: Declared, condition: Mapping[str, Any], now: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{model.name}-"},
        "involvedObject": {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": KIND,
            "name": model.name,
            "uid": model.uid,
        },
        "reason": condition["reason"],
        "message": condition["message"][:1000],
        "type": "Normal" if condition["type"] == "Ready" else "Warning",
        "source": {"component": "roundhouse-controller"},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
