"""Training loops (pretrain, finetune) over shared steps, and discovery; `dispatch` chooses the loop of an experiment."""
