"""What makes the numbers of the documentation: each module is a command."""

from joint_train.command import leave_out_torchao

leave_out_torchao()  # before any of them imports transformers
