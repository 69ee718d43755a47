"""Students that do not exist yet: smaller models of the teacher's family."""

import copy
import re
from pathlib import Path

import torch

import llms
from distillation.config import DistillConfig, StudentConfig
from tracking import checkpoints


def untrained_student(config: DistillConfig, folder: Path) -> str:
    """The name of the model that training starts from; a new one is made once and kept in folder/untrained."""
    if config.student_config is None:
        return config.model_name
    target = folder / "untrained"
    if not target.exists():
        teacher, tokenizer = llms.load(
            checkpoints.resolve_model_name(config.teacher_name), "cpu", trust_remote_code=config.trust_remote_code
        )
        unfinished = folder / ".untrained"
        student = new_student(StudentConfig.parse(config.student_config), teacher, config.seed)
        checkpoints.try_saving(student, tokenizer)
        student.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.replace(target)
    return str(target)


def new_student(student: StudentConfig, teacher, seed: int):
    """The model of that configuration, with random weights or copies of the teacher's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(teacher)(student.model_config(teacher.config)).float()
    model.generation_config = copy.deepcopy(teacher.generation_config)
    if student.init == "teacher_layers":
        layers = student.teacher_layers(teacher.config.num_hidden_layers)
        weights = teacher.state_dict()
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[re.sub(r"(?<=\blayers\.)\d+", lambda match: str(layers[int(match[0])]), name)])
    return model
