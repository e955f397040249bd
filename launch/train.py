"""For the deepspeed launcher: deepspeed launch/train.py --config configs/NAME.yaml [key=value ...]"""

from dr2dist.training.main import main

main()
