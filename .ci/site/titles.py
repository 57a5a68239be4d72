"""The words of the site that stand in no notebook: Chinese titles, the reading path, the playground's explanations."""

# Chinese for the titles that are English in the notebooks; a name needs none
TITLES = {
    "00_relations": "样本之间的关系", "losses/index": "损失函数", "losses/00_contract": "损失的约定",
    "losses/00_rkd": "RKD：关系知识蒸馏", "losses/01_kd": "KD：Hinton的知识蒸馏", "losses/02_fitnet": "FitNet：来自隐藏层的提示",
    "losses/03_at": "AT：注意力转移", "losses/04_sp": "SP：保持相似性的蒸馏", "losses/05_cc": "CC：相关一致性", "losses/06_vid": "VID：变分信息蒸馏",
    "losses/07_pkt": "PKT：概率知识转移", "losses/08_ab": "AB：激活边界", "losses/09_ft": "FT：因子转移", "losses/10_fsp": "FSP：求解过程的流",
    "losses/11_nst": "NST：神经元选择性转移", "losses/12_crd": "CRD：对比表示蒸馏", "losses/13_ofd": "OFD：特征蒸馏的全面检修",
    "losses/20_zoo": "十四个损失放在一起", "losses/21_fast_angle": "不用立方的角度损失", "losses/22_angle_triton": "GPU上的角度损失",
    "losses/24_tokens": "词元：蒸馏Transformer", "data/index": "数据", "lab/06_heads": "分类头：类别即方向",
    "tables/00_digits": "手写数字上的RKD", "tables/01_cifar100": "CIFAR-100上的RKD", "tables/02_tinyimagenet": "Tiny ImageNet上的RKD",
    "tables/03_omniglot": "Omniglot上的RKD", "tables/04_miniimagenet": "miniImageNet与CIFAR-FS上的RKD",
}
PATH = [                                                                 # the reading path: (floor, its pages in order)
    ("derive · 推导", ["00_relations", "losses/index", "playground"]),
    ("train · 训练", ["data/index", "lab/index", "tasks/index"]),
    ("in your loop · 用在你的循环里", ["clients/index"]),
    ("reproduce · 复现", ["tables/index", "records/index"]),
    ("look up · 查阅", ["api/index"]),
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
