"""How a student begins: as the teacher with layers removed, or as any pretrained model.

layers    the decoder layers of a model, and the model with only some of them
choose    which layers to keep, by measurement
begin     the stage: RUN/examples to RUN/beginning
"""
