"""The words of the site that stand in no notebook: the reading path, titles of rooms, the playground's explanations."""

PATH = [                                                                 # the reading path: (floor, its pages in order)
    ("derive · 推导", ["00_relations", "00_relations_numerics", "losses/index", "playground"]),
    ("train · 训练", ["data/index", "lab/index", "tasks/index"]),
    ("in your loop · 用在你的循环里", ["clients/index"]),
    ("reproduce · 复现", ["tables/index", "records/index"]),
    ("look up · 查阅", ["01_glossary", "api/index"]),
]
ROOMS = {                                                                # rooms without an index of their own
    "lab": ("The lab · 实验室", "What an experiment is made of, one idea a notebook.", "一个实验由什么组成，每个笔记本讲一件事。"),
    "tasks": ("Tasks · 任务", "What is learned and how it is tested.", "学什么，怎样测试。"),
    "tables": ("Tables · 表格", "One table of a paper, one notebook.", "一张表，一个笔记本。"),
}
PLAY = {"losses/00_rkd": "points", "losses/01_kd": "temperature"}
PLAY_TEXT = {
    "points": ("Drag the points · 拖动这些点",
               "Three samples as the teacher and as the student embeds them. Drag a point, or reach it with the Tab key and move it with "
               "the arrow keys: distances, cosines, both losses and their gradients follow. Turn, shift or enlarge the student's triangle: "
               "nothing changes.",
               "同样三个样本，左边是教师的嵌入，右边是学生的。拖动一个点（或用Tab键选中、用方向键移动），距离、余弦、两个损失和它们的梯度都会跟着变。"
               "把学生的三角形旋转、平移或放大：什么也不变。"),
    "temperature": ("Turn the temperature · 调节温度",
                    "Three classes. At a low temperature only the largest logit counts; at a high one the loss sees the order of the "
                    "others, and with $T^2$ the gradient keeps its size.",
                    "三个类别。温度低时只有最大的logit起作用；温度高时，损失看得见其余类别的次序；乘上$T^2$之后，梯度的大小不变。"),
}
