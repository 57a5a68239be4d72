"""Retrieval: recall with its ties, the triplets of the paper's code, the third task in the engine."""
from dataclasses import replace

import pytest
import test_retrieval_data as copies
import torch
import torch.nn.functional as F

from relkd.data import Dataset, flip, random_crop
from relkd.distill import Look, Row, Term
from relkd.models import create
from relkd.models.imagenet import ImageNet
from relkd.tables.recipe import Recipe, recipe
from relkd.tables.run import run, trained
from relkd.tasks.retrieval import Retrieval, map_at_r, metric_loss, ranks, recall
from relkd.tasks.triplet import distance_weights, on_sphere, triplet_loss, triplets
from relkd.train import Learner, Schedule, Session, fit

pml = pytest.importorskip('pytorch_metric_learning')


def noise(classes=6, images=12, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = 40 + 170 * torch.rand(classes, 1, 3, 1, 1, generator=g)
    x = (mean + 90 * torch.randn(classes, images, 3, size, size, generator=g)).clamp(0, 255).to(torch.uint8)
    return Dataset('noise', x.flatten(0, 1), torch.arange(classes).repeat_interleave(images),
                   {'train': tuple(range(classes - 2)), 'test': (classes - 2, classes - 1)}, tuple(map(str, range(classes))))


def by_topk(z, labels, k):
    d = torch.cdist(z.double(), z.double()).fill_diagonal_(torch.inf)
    near = labels[d.topk(k, largest=False).indices]
    return 100 * (near == labels[:, None]).any(1).double().mean().item()


@pytest.fixture
def points():
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 50, (1000,), generator=g)
    return torch.randn(50, 16, generator=g)[labels] + 1.2 * torch.randn(1000, 16, generator=g), labels


@pytest.mark.parametrize('at_once', [2**21, 5000, 1])
def test_recall_is_that_of_sorting(points, at_once):
    z, labels = points
    found = recall(ranks(z, labels, at_once=at_once), (1, 2, 4, 8, 10, 100))
    assert found == {k: by_topk(z, labels, k) for k in found}


def test_recall_is_that_of_pytorch_metric_learning(points):
    z, labels = points
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN
    knn = CustomKNN(LpDistance(normalize_embeddings=False))
    names = 'precision_at_1', 'mean_average_precision_at_r'
    theirs = AccuracyCalculator(include=names, k='max_bin_count', knn_func=knn, device=torch.device('cpu')).get_accuracy(z, labels)
    assert recall(ranks(z, labels))[1] == pytest.approx(100 * theirs[names[0]], abs=1e-9)
    assert map_at_r(z, labels) == pytest.approx(100 * theirs[names[1]], abs=1e-9)


def test_far_from_the_origin_the_digits_stay(points):
    z, labels = points
    assert recall(ranks(z + 300, labels), (1, 8)) == pytest.approx({k: by_topk(z, labels, k) for k in (1, 8)}, abs=.5)


def test_a_collapsed_network_retrieves_nothing():
    labels = torch.arange(6).repeat_interleave(10)
    for value in (0., 1., 1e4):
        assert recall(ranks(torch.full((60, 8), value), labels), (1, 8)) == {1: 0., 8: 0.}


def test_ties_lone_images_and_broken_embeddings():
    z, labels = torch.tensor([[0.], [3], [1], [5], [6], [9]]), torch.tensor([0, 0, 1, 1, 1, 2])
    assert ranks(z, labels).tolist() == [1, 3, 2, 0, 0, -1]              # 6 lies at 3 exactly as far as 0 does
    z[3] = torch.nan                                                     # is never right, and in nobody's way
    assert ranks(z, labels)[[0, 1, 5]].tolist() == [1, 2, -1] and ranks(z, labels)[3] >= 3
    with pytest.raises(ValueError, match='nothing to retrieve'):
        recall(ranks(torch.randn(4, 2), torch.arange(4)))


def test_groups_are_galleries(points):
    z, labels = points
    groups = labels % 2
    halves = torch.empty(1000, dtype=torch.long)
    for k in (0, 1):
        halves[groups == k] = ranks(z[groups == k], labels[groups == k])
    assert torch.equal(ranks(z, labels, groups), halves)


def released_weights(z, labels):
    "The formula of the released code with a Gram matrix, in float64, element for element as a mask."
    D, eye = z.shape[1], torch.eye(len(z), dtype=torch.float64)
    z = F.normalize(z.double(), dim=1)
    d = ((2 - 2 * z @ z.T).clamp(min=1e-12) * (1 - eye) + eye).sqrt().clamp(min=.5)
    log = (2. - D) * d.log() - (D - 3.) / 2 * (1 - .25 * d * d).log()
    w = (log - log.max(1, keepdim=True).values).float().exp().double()
    other = (labels[:, None] != labels).double()
    w = w * other * (d < 1.4)
    w = w + (w.sum(1, keepdim=True) == 0) * other
    return w / w.sum(1, keepdim=True)


@pytest.mark.parametrize('D', [4, 16, 48])
def test_negatives_are_drawn_as_in_the_released_code(D):
    g = torch.Generator().manual_seed(D)
    labels = torch.arange(24).repeat_interleave(5)
    z = F.pad(torch.randn(24, 1, 4, generator=g), (0, D - 4)) + .6 * torch.randn(24, 5, D, generator=g) / D**.5
    z = on_sphere(z.flatten(0, 1))
    mine, theirs = distance_weights(z, labels), released_weights(z, labels)
    assert torch.allclose(mine.double(), theirs, atol=1e-3)
    assert (mine.sum(1) - 1).abs().max() < 1e-5 and mine[labels[:, None] == labels].max() == 0


def test_opposite_and_dead_points_have_chances():
    z = torch.tensor([[1., 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    w = distance_weights(z, torch.tensor([0, 1, 0, 1]))
    assert w.isfinite().all() and torch.allclose(w.sum(1), torch.ones(4))


def test_pairs_of_a_batch_in_class_order_need_no_look_at_the_labels():
    labels = torch.tensor([7, 2, 5]).repeat_interleave(4)
    z = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for images in (None, 4):
        torch.manual_seed(3)
        found.append(triplets(z, labels, images))
    assert all(a.equal(b) for a, b in zip(*found))


def test_every_ordered_pair_once_and_the_mean_over_all():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    z = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.manual_seed(0)
    a, p, n = triplets(z, labels)
    assert sorted(zip(a.tolist(), p.tolist())) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 4), (4, 3)]
    assert (labels[a] == labels[p]).all() and (labels[a] != labels[n]).all()
    torch.manual_seed(0)
    loss = triplet_loss(z, labels, .3)
    by_hand = [max(0., ((z[i] - z[j]).norm() - (z[i] - z[k]).norm() + .3).item()) for i, j, k in zip(a, p, n)]
    assert loss.item() == pytest.approx(sum(by_hand) / 8, abs=1e-5)
    loss.backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize('labels', [[0, 0, 0], [0, 1, 2]])
def test_triplets_need_a_pair_and_a_negative(labels):
    with pytest.raises(ValueError, match='two classes and a class with two samples'):
        triplets(torch.randn(3, 4), torch.tensor(labels))


def test_on_sphere_at_zero():
    z = torch.zeros(2, 3, requires_grad=True)
    y = torch.cat([on_sphere(z), on_sphere(torch.ones(1, 3))])
    y.sum().backward()
    assert torch.allclose(y.detach().norm(dim=1), torch.tensor([0., 0., 1.])) and z.grad.abs().max() <= 1


TASK = Retrieval(size=4, teacher_size=6, images=4, length=3, ks=(1, 2), augment=((flip, {}),))
SCHEDULE = Schedule(epochs=2, batch_size=8, lr=1e-2, weight_decay=0., milestones=(), optimiser='Adam')
TERMS = Term('RKDDistance', 1., 'logits', 'logits'), Term('RKDAngle', 2., 'logits', 'logits')
RECIPE = Recipe(name='own/metric', title='noise', data=noise, task=TASK, teacher='resnet8x0.25', student='resnet8x0.25',
                rows=(Row('Triplet', changes={'l2': True}), Row('RKD-DA', TERMS, task=0.),
                      Row('RKD-DA, 2', TERMS, task=0., changes={'size': 2})), schedule=SCHEDULE, seeds=(0,))


def test_a_recipe_runs_and_its_row_teaches_another(tmp_path):
    records = run(RECIPE, Session(out=tmp_path, device='cpu'))
    assert [r['row'] for r in records] == ['Teacher', 'Triplet', 'RKD-DA', 'RKD-DA, 2']
    assert [r['protocol']['task']['size'] for r in records] == [6, 4, 4, 2]
    assert [r['protocol']['task']['l2'] for r in records] == [True, True, False, False]
    assert all(set(r['tests']) == {'Recall@1', 'Recall@2'} and r['tests']['Recall@1']['queries'] == 24 for r in records)
    session = Session(out=tmp_path, device='cpu')
    assert trained(RECIPE, 'RKD-DA, 2', 0, session).fc.out_features == 2
    taught = next(r for r in records if r['row'] == 'RKD-DA')
    own = replace(RECIPE, name='own/second', task=replace(TASK, teacher_size=4, teacher_l2=False), rows=RECIPE.rows[1:2],
                  teacher_weights=('own/metric', 'RKD-DA'))
    import relkd.tables.recipe as recipes
    known = recipes.recipe
    recipes.recipe = lambda name: RECIPE if name == 'own/metric' else known(name)
    try:
        again = run(own, session)
    finally:
        recipes.recipe = known
    teacher, student = again[-2:]
    assert teacher['weights'] == taught['weights'] == student['teacher_weights']
    assert teacher['tests'] == taught['tests'] and teacher['protocol']['weights'] == {'recipe': 'own/metric', 'row': 'RKD-DA'}


def test_the_teacher_is_read_as_a_teacher():
    data = noise()
    teacher = create('resnet8x0.25', 6, 3, 0)
    seen = []
    def spy(student, teacher):
        seen.append(teacher.norm(dim=1))
        return (student - 1).square().mean()
    learner = Learner(create('resnet8x0.25', 4, 3, 1), Row('spy', (Term(spy, 1., 'logits', 'logits'),), task=0.), SCHEDULE, 0, TASK)
    fit([learner], TASK.stream(data, SCHEDULE, 0), 1, teacher)
    assert torch.allclose(seen[-1], torch.ones(8), atol=1e-5)                # on its sphere, though the student is not


@pytest.mark.parametrize('change, says', [
    (dict(images=40), "class '0' of noise has 12"), (dict(ks=()), 'K from 1'), (dict(size=0), 'at least 1 number'),
    (dict(metric='TripletLoss'), 'did you mean'), (dict(metric='ContrastiveLoss', miner='HardMiner'), 'did you mean'),
    (dict(metric='ContrastiveLoss', metric_options={'nonsense': 1}), 'cannot be made from'),
    (dict(metric='ProxyAnchorLoss', metric_options=dict(num_classes=4, embedding_size=4)), 'weights of its own')])
def test_what_cannot_be_is_said_before_training(change, says):
    with pytest.raises(ValueError, match=says):
        replace(TASK, **change).check(noise())


def test_bad_batches_rows_and_crops(tmp_path):
    with pytest.raises(ValueError, match='a batch of 10 cannot hold two whole classes of 4 images'):
        run(replace(RECIPE, schedule=replace(SCHEDULE, batch_size=10), teacher_schedule=SCHEDULE), Session(out=tmp_path, device='cpu'))
    with pytest.raises(ValueError, match="changes 'images' of Retrieval, which leaves size, l2 to its rows"):
        run(replace(RECIPE, rows=(Row('x', changes={'images': 2}),)), Session(out=tmp_path, device='cpu'))
    with pytest.raises(ValueError, match='a centre of 9 x 9 was asked for; images of noise are 8 x 8'):
        replace(TASK, crop=9).check(noise())
    samples = noise()
    samples = replace(samples, splits={'train': range(48), 'test': range(48, 72)})
    with pytest.raises(ValueError, match='needs classes split into train and test'):
        TASK.check(samples)
    lone = replace(noise(), labels=torch.arange(6).repeat_interleave(12)).with_splits({'train': (0, 1), 'test': (2,)})
    TASK.check(lone)


def test_library_losses_by_name(points):
    from pytorch_metric_learning import losses, miners
    z, labels = points[0][:60], points[1][:60] % 6
    assert metric_loss('ContrastiveLoss')(z, labels) == losses.ContrastiveLoss()(z, labels)
    mine = metric_loss('TripletMarginLoss', {'margin': .1}, 'MultiSimilarityMiner', {'epsilon': .2})(z, labels)
    assert mine == losses.TripletMarginLoss(margin=.1)(z, labels, miners.MultiSimilarityMiner(epsilon=.2)(z, labels))


def test_narrow_strided_convolutions_keep_the_usual_layout():
    from relkd.tables.experiment import memory_format
    for name, wanted in (('resnet8x0.25', torch.contiguous_format), ('resnet8x0.5', torch.channels_last), ('conv4', torch.channels_last)):
        assert memory_format(create(name, None, 3)) is wanted


def small_cars(root):
    for split, classes in (('train', (1, 2, 98)), ('test', (99, 196))):
        for c in classes:
            for i in range(3):
                copies.picture(root / 'cars196' / split / f'Make {c:03}' / f'{i}.jpg', i)


@pytest.mark.filterwarnings('ignore:.* for training and retrieval')
@pytest.mark.parametrize('name, place', [('metric/cub', copies.cub), ('metric/cars', small_cars), ('metric/sop', copies.sop)])
def test_the_papers_recipes_run_on_small_copies(tmp_path, name, place, flags):
    if name != 'metric/sop' and 'slow' not in flags:
        pytest.skip('one of three that go one way: --flags slow')
    place(tmp_path / 'data')
    whole, untrained = recipe(name), ImageNet('resnet18', pretrained=False)
    assert whole.teacher == ImageNet('resnet50') and {r.changes['size'] for r in whole.rows} <= {16, 32, 64, 128}
    task = replace(whole.task, images=2, length=1, teacher_length=1, crop=64, augment=((random_crop, {'size': 64}), (flip, {})))
    one = replace(whole.schedule, epochs=1, batch_size=4)
    rows = tuple(r for r in whole.rows if r.name in ('Triplet 64', 'RKD-DA 64'))
    small = replace(whole, task=task, teacher=untrained, student=untrained, rows=rows, schedule=one,
                    teacher_schedule=one, seeds=(0,), eval_every=1)
    records = run(small, Session(out=tmp_path / 'out', root=tmp_path / 'data', device='cpu'))
    assert [r['row'] for r in records] == ['Teacher', 'Triplet 64', 'RKD-DA 64']
    assert list(records[0]['tests']) == [f'Recall@{k}' for k in whole.task.ks] and all(r['epochs'][0]['loss'] is not None for r in records)


def test_generations_take_their_teacher_from_the_one_before():
    first, second = recipe('metric/cub-gen1'), recipe('metric/cub-gen2')
    assert (first.teacher_weights, second.teacher_weights) == (('metric/cub', 'Teacher'), ('metric/cub-gen1', 'RKD-DA'))
    assert first.student == first.teacher and first.task.size == 512 and first.task.teacher_l2 and not second.task.teacher_l2
