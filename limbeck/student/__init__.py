"""How a student begins: as the teacher made smaller, or as any pretrained model.

calibrate     the answers that pruning is measured on, and how far a model strays from its teacher there
layers        the decoder layers of a model, and the model with only some of them
choose        which layers to keep, by measurement
width         the attention heads and MLP neurons of a model's layers, and whether some of them can go
narrow        the model with only some of them
activation    which heads and neurons to keep, by measurement
wanted        the numbers of the recipe, held against the teacher's
prune         the teacher without what goes
facts         what the ledger keeps of that
saving        the student on disk, proved to be the one that was measured
begin         the stage: RUN/examples to RUN/beginning
"""
