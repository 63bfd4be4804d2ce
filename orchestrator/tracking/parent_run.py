"""`ParentRun`: the child runs of an MLflow run, and the shared view of the table that shows them."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.tracking.sink import MlflowSink

if TYPE_CHECKING:
    from mlflow.entities import Run

_MOST_CHILDREN = 5000


class ParentRun:
    """The runs below the run of `sink`."""

    def __init__(self, sink: MlflowSink) -> None:
        self._sink = sink

    def share_view(self, key: str, *, columns: Sequence[str], order_by: str, query: str) -> str:
        """Store a view of the experiment's table of runs, as the "share" button of MLflow's page does.

        Args:
            columns: in MLflow's notation, "params.`a.b`" and "metrics.`c`".
            order_by: the column to sort by, largest first.
            query: filter of the runs that are shown.

        Returns:
            The page's path below the address of the server.
        """
        from orchestrator.tracking.private import SHARED_VIEW_TAG

        state = {
            **{"searchFilter": query, "orderByKey": order_by, "orderByAsc": False, "startTime": "ALL"},
            **{"lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs"},
            **{"selectedColumns": list(columns), "runsExpanded": {self._sink.open(): True}},
        }
        experiment_id = self._sink.connect()
        self._sink.client.set_experiment_tag(experiment_id, f"{SHARED_VIEW_TAG}{key}", json.dumps(state))
        return f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}"

    def children(self) -> "list[Run]":
        """The child runs, at most 5000."""
        query = f"tags.`mlflow.parentRunId` = '{self._sink.open()}'"
        return list(self._sink.client.search_runs([self._sink.connect()], query, max_results=_MOST_CHILDREN))

    def kill_children(self, *, except_names: Sequence[str]) -> None:
        """Mark the children that are RUNNING as KILLED, except those of the given names."""
        for child in self.children():
            if child.info.status == "RUNNING" and child.info.run_name not in except_names:
                self._sink.client.set_terminated(child.info.run_id, status="KILLED")

    def add_child(self, *, name: str, params: Mapping[str, str], tags: Mapping[str, str], status: str) -> None:
        """Create a child run that has only parameters and tags, and end it; one that was left incomplete is completed."""
        from mlflow.entities import Param

        client = self._sink.client
        child = next((child for child in self.children() if child.info.run_name == name), None)
        if child is not None and child.info.status == status:
            return
        if child is None:
            child = client.create_run(self._sink.connect(), run_name=name, tags=dict(tags))
        missing = [Param(key, value) for key, value in params.items() if key not in child.data.params]
        client.log_batch(child.info.run_id, params=missing)
        client.set_terminated(child.info.run_id, status=status)
