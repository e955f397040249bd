"""For the deepspeed launcher: deepspeed launch/train.py --config FILE [key=value ...]"""

from dr2dist.status import end_after
from dr2dist.training.main import main

if __name__ == "__main__":  # data workers import this file too
    end_after(main)
