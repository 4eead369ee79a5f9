"""The files that several results of a batch need: each is made once, and the others take it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorafuse.batching.existing_results import ExistingResults
from lorafuse.batching.one_pass import JobInProgress
from lorafuse.merge.destination import Written
from lorafuse.outdir.output import Output
from lorafuse.planning.plan import PlannedShard

Takers = Mapping[str, Sequence[tuple[JobInProgress, str]]]  # file → who takes it, and under which name


@dataclass
class CommonFiles:
    """Who makes a common file, and who takes it from whom. `share`: one of `sharing.SHARE_CHOICES`."""

    finished: ExistingResults
    share: str

    def divide(self, in_progress: Sequence[JobInProgress]) -> None:
        """Take each common file from a result, finished or resumed, or let one job make it for all."""
        for making in in_progress:
            for file, shard in making.result.finished.items():
                self._offer(making, file, shard.written)
        takers: dict[str, list[tuple[JobInProgress, str]]] = {}
        for making in in_progress:
            for file, key in making.job.common.items():
                if file not in making.result.finished and not self._taken(making, file, key):
                    takers.setdefault(key, []).append((making, file))
        makes: dict[int, dict[str, list[tuple[JobInProgress, str]]]] = {}
        for (maker, file), *others in takers.values():
            makes.setdefault(id(maker), {})[file] = others
            for making, own_file in others:
                making.waits.add(own_file)
        for making in in_progress:
            if id(making) in makes:
                making.commons = self._commons(making, makes[id(making)])

    def offer(self, making: JobInProgress) -> None:
        """The common files of a result that has its name, for those that come later."""
        for written in making.main.outcome.written:
            self._offer(making, written.file, written)

    def _offer(self, making: JobInProgress, file: str, written: Written) -> None:
        if key := making.job.common.get(file):
            self.finished.offer(key, making.result.finished_file(file), written)

    def _taken(self, making: JobInProgress, file: str, key: str) -> bool:
        shared = self.finished.known(key)  # and no more: the event of the pass said what is written
        if shared is None:
            return False
        try:
            making.result.take(file, shared.file, self.share)
        except FileNotFoundError:  # removed meanwhile
            self.finished.forget(key)
            return False
        making.has(shared.written, file)
        return True

    def _commons(self, maker: JobInProgress, makes: Takers) -> Output:
        """An output of the maker's files that `makes` names, in its output directory. It goes on if the
        maker's adapter fails."""

        def give(shard: PlannedShard, written: Written) -> None:
            maker.has(written, shard.file)
            # Of one result only: the others would be hashed again when they are resumed.
            maker.result.record(written, {})
            made = maker.result.finished_file(shard.file)
            for making, file in makes[shard.file]:
                if making.main.error is None:
                    making.result.take(file, made, self.share)
                    making.has(written, file)
                    making.waits.remove(file)

        plan = maker.job.plan
        skip = {shard.file for shard in plan.shards} - makes.keys()
        return Output(plan, maker.result, maker.job.on_event, skip=skip, on_shard=give)
