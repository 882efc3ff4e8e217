"""examples/ensemble.py: several networks are better than one."""

import re

from conftest import one_line

from examples import ensemble
from utils import load_checkpoint


def test_each_network_has_its_own_seed_and_together_they_do_better(
    small_data_dir, tmp_path, capsys
):
    flags = ["--epochs=2", "--batch-size=32", "--device=cpu", "--seed=3"]
    folders = [f"--data-dir={small_data_dir}", f"--out-dir={tmp_path}"]
    ensemble.main(ensemble.parse_args(["3", *flags, *folders]))
    seeds = [load_checkpoint(path)["settings"]["seed"] for path in tmp_path.glob("*/last.pt")]
    assert sorted(seeds) == [3, 4, 5]
    output = capsys.readouterr().out
    alone = [float(found) for found in re.findall(r"Seed \d: ([\d.]+)%", output)]
    together = float(re.search(r"together: ([\d.]+)%\n$", output)[1])
    assert len(alone) == 3 and together > sum(alone) / 3


def test_a_wrong_flag_is_train_pys_to_explain(run_here):
    one_line(run_here("examples/ensemble.py", "2", "--epochz", "3"), 2, "--epochz")
