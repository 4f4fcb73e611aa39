"""Train the Unsupervised Feature Fusion (UFF) on the patch features of good training samples.

The method with three banks takes three steps. This script is the second:

    python main.py --method_name DINO+Point_MAE --memory_bank multiple --save_feature \\
        --save_feature_path datasets/patch_lib
    OMP_NUM_THREADS=1 python fusion_pretrain.py --accum_iter 16 --lr 0.003 --batch_size 16 \\
        --data_path datasets/patch_lib --output_dir checkpoints
    python main.py --method_name DINO+Point_MAE+Fusion --use_uff --memory_bank multiple \\
        --fusion_module_path checkpoints/checkpoint-2.pth

Several processes, one per GPU (also with `python -m torch.distributed.launch`, or mpirun and --dist_on_itp):

    torchrun --nproc_per_node=4 fusion_pretrain.py --data_path datasets/patch_lib --output_dir checkpoints

As long as in the paper: --max_steps 750 --warmup_steps 250 --lr 0.003. After an interruption, add --resume
checkpoints/checkpoint-last.pth to the same flags. More: docs/TRAINING_UFF.md.
"""

import argparse
import os
from collections.abc import Sequence

from runner.pretrain_config import PretrainConfig
from utils.choices import NEGATIVES, PAIRINGS, PRECISIONS
from utils.command_line import MOST_WORKERS, Parser
from utils.reporting.messages import exit_on_error, start_messages

COUNTS = ("batch_size", "epochs", "accum_iter", "max_steps", "save_steps", "world_size", "xyz_dim", "input_size")
BOUNDS = {
    **dict.fromkeys(COUNTS, (1, 10**9)),
    **dict.fromkeys(("warmup_epochs", "warmup_steps", "start_epoch"), (0, 10**9)),
    **{"min_lr": (0, 1e30), "weight_decay": (0, 1000), "val_fraction": (0, 0.999), "seed": (0, 2**32 - 1)},
    **{"num_workers": (0, MOST_WORKERS), "local_rank": (-1, 10**9), "lr": (1e-12, 1e30), "blr": (1e-12, 1e30)},
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, BOUNDS)
    add = parser.add_argument
    add("--batch_size", type=int, default=16, help="samples per process and micro-batch")
    add("--epochs", type=int, default=3, help="number of epochs")
    add("--accum_iter", type=int, default=16, help="micro-batches per update")
    add("--weight_decay", type=float, default=1.5e-6, help="weight decay of AdamW, on all parameters")
    add("--lr", type=float, help="peak learning rate (default: blr * batch_size * accum_iter * processes / 256)")
    add("--blr", type=float, default=0.002, help="peak learning rate for an effective batch of 256")
    add("--min_lr", type=float, default=0.0, help="learning rate at the end of the cosine")
    add("--warmup_epochs", type=int, default=1, help="epochs of linear warm-up from 0")
    add("--max_steps", type=int, help="train for this many updates instead of --epochs; the paper: 750")
    add("--warmup_steps", type=int, help="updates of linear warm-up from 0 (default: a third of --max_steps)")
    add("--drop_last_group", action="store_true", help="skip an epoch's last, incomplete update, as the original does")
    add("--negatives", choices=NEGATIVES, default="local", help="contrast with patches of this process or of all")
    add("--val_fraction", type=float, default=0.0, help="share of the files used for validation")
    add("--data_path", default="datasets/patch_lib", help="folder of patch files")
    add("--output_dir", default="./output_dir", help="folder of the checkpoints and log.txt")
    add("--save_steps", type=int, default=100, help="updates between two saves of checkpoint-last.pth")
    add("--log_dir", help="folder of TensorBoard events (default: none are written)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number>; auto takes a GPU if there is one")
    add("--seed", type=int, default=0, help="seed of the initial weights and of the order of samples")
    add("--resume", metavar="CHECKPOINT", help="continue from this checkpoint")
    add("--start_epoch", type=int, help="first epoch without --resume (default: 0)")
    # A batch of 16 takes 385 MB and each worker holds two: the original's 10 workers would hold 7.7 GB.
    add("--num_workers", type=int, default=min(4, os.cpu_count() or 1), help="workers that read files, per process")
    add("--pin_mem", action=argparse.BooleanOptionalAction, default=True, help="page-locked batches, if there is a GPU")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="another spelling of --no-pin_mem")
    add("--world_size", type=int, help="number of processes without a launcher (default: 1)")
    add("--local_rank", "--local-rank", type=int, help="number of this process on its machine; launchers set it")
    add("--dist_on_itp", action="store_true", help="take rank and number of processes from mpirun (OMPI_COMM_WORLD_*)")
    add("--dist_url", default="env://", help="address where the processes meet; env:// takes the launcher's")
    add("--uff_pairing", choices=PAIRINGS, help="reference: the original's wrong order (default: that of the files)")
    add("--xyz_dim", type=int, help="width of xyz in the original's .pt files (default: found from the background)")
    precision = "precision of the networks; the loss is always fp32; auto: bf16 on a GPU, fp32 on a CPU"
    add("--precision", choices=PRECISIONS, default="auto", help=precision)
    add("--input_size", type=int, default=224, help="no effect, as in the original")
    return parser.parse_args(argv)


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    config = PretrainConfig(**vars(parse_args(argv)))
    start_messages("%(message)s")
    from runner.pretraining import run  # imports torch, which --help does not need

    run(config)


if __name__ == "__main__":
    main()
