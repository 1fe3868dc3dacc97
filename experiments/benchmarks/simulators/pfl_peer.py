"""pfl-research's simulation of the work, run by an interpreter that has pfl: see `__main__.py`.

pfl's own backend, data sets, federated averaging and central Gaussian mechanism. The local step is
Opacus's, as pfl has none that clips each record.

    python pfl_peer.py MODEL COHORT ROUNDS CORES
"""

import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import work
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism


class Module(torch.nn.Module):
    """The client as pfl's models want it: with a loss and metrics."""

    def __init__(self, client: work.Client) -> None:
        super().__init__()
        self.client, self.model = client, client.model

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the sum of the records' losses."""
        return self.client.loss(ids.long())

    def metrics(self, _: torch.Tensor) -> dict[str, float]:
        """Return nothing: the benchmark measures no quality."""
        return {}


def main(folder: Path, cohort: int, rounds: int, cores: int) -> None:
    """Run the rounds, and say how many clients a second there were."""
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    client = work.Client(folder, cores // workers)
    users = list(range(cohort))
    people = {user: np.array(work.records_of(user)) for user in users}
    data = FederatedDataset(
        lambda user: Dataset([people[user]], user_id=str(user)),
        get_user_sampler("minimize_reuse", users),
    )
    model = PyTorchModel(
        Module(client),
        lambda *_, **__: client.optimizer(),
        torch.optim.SGD(client.parameters, lr=1.0),
    )
    privacy = CentrallyAppliedPrivacyMechanism(GaussianMechanism(1.0, 1.0))
    backend = SimulatedBackend(data, data, [privacy])

    def run(count: int) -> float:
        began = time.perf_counter()
        FederatedAveraging().run(
            NNAlgorithmParams(
                central_num_iterations=count,
                evaluation_frequency=count + 1,
                train_cohort_size=cohort,
                val_cohort_size=0,
            ),
            backend,
            model,
            NNTrainHyperParams(
                local_learning_rate=work.RATE,
                local_num_epochs=None,
                local_batch_size=work.BATCH,
                local_num_steps=work.STEPS,
            ),
            NNEvalHyperParams(local_batch_size=work.BATCH),
        )
        return time.perf_counter() - began

    run(1)
    seconds = run(rounds)
    work.said(clients_per_s=cohort * rounds / seconds, version=version("pfl"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
