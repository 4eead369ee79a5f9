"""Which repository on the hub each job of a batch has."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorafuse.batching.jobs import Job
from lorafuse.errors import UsageError, shown
from lorafuse.settings import JOB_NAME, Push


def pushes_of(jobs: Sequence[Job], push: Push | None) -> Mapping[str, Push]:
    """Job → where its result goes: as its line says, else as the call does. Raises UsageError for two results
    in one repository, for what is no repository, and for pull requests, which hold no result to go on from.
    """
    if push and push.create_pr:
        raise UsageError("--create-pr is for a single merge; a batch needs a branch of each repository.")
    pushes: dict[str, Push] = {}
    job_of: dict[str, str] = {}
    for job in jobs:
        repo = job.repo or (push.repo if push else None)
        if repo is None:
            continue
        try:
            pushes[job.name] = replace(push or Push(repo), repo=repo.replace(JOB_NAME, job.name))
        except UsageError as e:
            raise UsageError(f"{shown(job.name)}: {e}") from None
        other = job_of.setdefault(pushes[job.name].repo, job.name)
        if other != job.name:
            raise UsageError(
                f"The results {shown(other)} and {shown(job.name)} would both go to {repo}; give a pattern, "
                f"such as me/{JOB_NAME}, or a repo for each job."
            )
    return pushes
