// The relational losses of three points, and KD's temperature, to be played with. The first half is the mathematics:
// tests/test_site.py lets node compute it and compares it with relkd, so nothing in it touches the page.
'use strict'
const dot = (a, b) => a.reduce((sum, x, k) => sum + x * b[k], 0)
const minus = (a, b) => a.map((x, k) => x - b[k])
const times = (a, c) => a.map(x => x * c)
const length = a => Math.sqrt(dot(a, a))
const add = (to, a, c) => a.forEach((x, k) => { to[k] += c * x })
const huber = x => Math.abs(x) <= 1 ? x * x / 2 : Math.abs(x) - 0.5
const slope = x => Math.max(-1, Math.min(1, x))                                // derivative of huber

const td = e => e.map(ej => e.map(ei => minus(ei, ej)))                         // [j][i] = e_i - e_j
const normTd = e => td(e).map(row => row.map(v => { const l = length(v); return l <= 1e-12 ? times(v, 0) : times(v, 1 / l) }))
const angles = e => normTd(e).map(u => u.map(a => u.map(b => dot(a, b))))       // [j][i][k]: cosine at j
const pdist = e => td(e).map((row, j) => row.map((v, i) => i === j ? 0 : Math.max(length(v), 1e-6)))
const meanDistance = e => pdist(e).flat().reduce((a, b) => a + b, 0) / (e.length * (e.length - 1))

function rkdDistance(s, t) {          // {value, gradient of every student point}; the mean over all N^2 entries
  const n = s.length, d = pdist(s), mu = meanDistance(s), known = pdist(t), muT = meanDistance(t)
  const gap = d.map((row, i) => row.map((x, j) => x / mu - known[i][j] / muT))
  const g = gap.map(row => row.map(x => slope(x) / n ** 2))
  const through = g.flatMap((row, i) => row.map((x, j) => x * d[i][j])).reduce((a, b) => a + b, 0) / mu ** 2 / (n * (n - 1))
  const gradient = s.map((p, i) => {
    const sum = times(p, 0)
    s.forEach((q, j) => { if (i !== j) add(sum, minus(p, q), 2 * (g[i][j] / mu - through) / d[i][j]) })
    return sum
  })
  return { value: gap.flat().reduce((a, x) => a + huber(x), 0) / n ** 2, gradient }
}

function rkdAngle(s, t) {             // the same for the cosines; the mean over all N^3 entries
  const n = s.length, u = normTd(s), v = td(s), cs = angles(s), ct = angles(t), gradient = s.map(p => times(p, 0))
  let value = 0
  for (let j = 0; j < n; j++) for (let i = 0; i < n; i++) {
    const pull = times(s[0], 0)       // derivative by the unit vector from j to i
    for (let k = 0; k < n; k++) {
      value += huber(cs[j][i][k] - ct[j][i][k]) / n ** 3
      add(pull, u[j][k], 2 * slope(cs[j][i][k] - ct[j][i][k]) / n ** 3)
    }
    if (i === j || length(v[j][i]) <= 1e-12) continue
    const turned = times(minus(pull, times(u[j][i], dot(pull, u[j][i]))), 1 / length(v[j][i]))
    add(gradient[i], turned, 1)
    add(gradient[j], turned, -1)
  }
  return { value, gradient }
}

function softmax(z, T) {
  const top = Math.max(...z), e = z.map(x => Math.exp((x - top) / T)), sum = e.reduce((a, b) => a + b, 0)
  return e.map(x => x / sum)
}
function kd(z, v, T) {                // {value: T^2 KL(p || q), gradient by the student's logits}
  const q = softmax(z, T), p = softmax(v, T)
  return { value: T * T * p.reduce((a, x, c) => a + (x > 0 ? x * Math.log(x / q[c]) : 0), 0), gradient: q.map((x, c) => T * (x - p[c])) }
}
if (typeof module !== 'undefined') module.exports = { td, normTd, angles, pdist, meanDistance, rkdDistance, rkdAngle, softmax, kd }

// ---------------------------------------------------------------------------------------------------------------- the page
const both = (en, zh) => `<span class="only-en" lang="en">${en}</span><span class="cut"> · </span><span class="only-zh" lang="zh-CN">${zh}</span>`
const show = (x, n = 3) => (Math.abs(x) < 0.5 * 10 ** -n ? 0 : x).toFixed(n).replace('-', '−')
const vector = v => `(${v.map(x => show(x, 2)).join(', ')})`
const NAMES = ['A', 'B', 'C'], PAIRS = [[0, 1], [0, 2], [1, 2]]
const SIZE = 300, UNIT = 40
const px = p => [SIZE / 2 + UNIT * p[0], SIZE / 2 - UNIT * p[1]]
const table = (head, rows) => `<table><thead><tr><th></th>${head.map(h => `<th>${h}</th>`).join('')}</tr></thead><tbody>` +
  rows.map(([h, ...cells]) => `<tr><th>${h}</th>${cells.map(c => `<td>${c}</td>`).join('')}</tr>`).join('') + '</tbody></table>'
const loop = (box, step) => {         // the three buttons, and the steps of "train"
  let left = 0
  const go = () => { if (left-- > 0) { step(); requestAnimationFrame(go) } }
  box.querySelector('.step').onclick = () => { left = 0; step() }
  box.querySelector('.train').onclick = () => { const idle = left <= 0; left = idle ? 300 : 0; if (idle) go() }
  return () => { left = 0 }
}
const BUTTONS = `<button class="step">${both('one step', '走一步')}</button> <button class="train">${both('train', '训练')}</button> ` +
  `<button class="again">${both('begin again', '重来')}</button>`

function points(box) {
  const begin = { teacher: [[-1.5, -1.5], [1.5, -1.5], [-1.5, 2.5]], student: [[-2, 0.8], [0.3, -0.9], [2, 0.2]] }
  const e = JSON.parse(JSON.stringify(begin))
  const panel = (who, title) => `<figure><figcaption>${title}</figcaption><svg viewBox="0 0 ${SIZE} ${SIZE}" data-who="${who}"></svg></figure>`
  box.innerHTML = `<div class="panels">${panel('teacher', both('teacher: drag', '教师：可以拖动'))}${panel('student', both('student: drag', '学生：可以拖动'))}</div>
    <p class="legend"><i class="d"></i>${both('downhill of RKD-D', 'RKD-D的下降方向')} <i class="a"></i>${both('downhill of RKD-A', 'RKD-A的下降方向')}</p>
    <p class="controls"><label>${both('follow', '沿着')} <select><option value="1,0">RKD-D</option><option value="0,1">RKD-A</option>
    <option value="1,2" selected>RKD-D + 2 RKD-A</option></select></label> ${BUTTONS}</p><div class="numbers" aria-live="polite"></div>`
  const weights = () => box.querySelector('select').value.split(',').map(Number)
  function arrow(p, g, kind) {
    const size = length(g)
    if (size < 1e-5) return ''
    const [x, y] = px(p), far = 60 * Math.min(1, size / 0.15) + 8, [dx, dy] = [-g[0] / size, g[1] / size], to = [x + (far + 13) * dx, y + (far + 13) * dy]
    return `<path class="${kind}" d="M${x + 13 * dx} ${y + 13 * dy}L${to}M${to[0] - 7 * dx - 4 * dy} ${to[1] - 7 * dy + 4 * dx}L${to}L${to[0] - 7 * dx + 4 * dy} ${to[1] - 7 * dy - 4 * dx}"/>`
  }
  function draw() {
    const D = rkdDistance(e.student, e.teacher), A = rkdAngle(e.student, e.teacher)
    box.querySelectorAll('svg').forEach(svg => {
      const who = svg.dataset.who, focus = svg.contains(document.activeElement) && document.activeElement.dataset.k
      const arrows = who === 'student' ? e[who].map((p, k) => arrow(p, D.gradient[k], 'd') + arrow(p, A.gradient[k], 'a')).join('') : ''
      svg.innerHTML = `<polygon points="${e[who].map(px).join(' ')}"/>${arrows}` + e[who].map((p, k) =>
        `<g data-k="${k}" tabindex="0" role="button" aria-label="${who} ${NAMES[k]} ${vector(p)}" transform="translate(${px(p)})"><circle r="22"/><circle class="dot" r="11"/><text>${NAMES[k]}</text></g>`).join('')
      if (focus) svg.querySelector(`[data-k="${focus}"]`).focus()
    })
    const both2 = f => [f(e.teacher), f(e.student)], ways = [both('teacher', '教师'), both('student', '学生')]
    const [dt, ds] = both2(pdist), [mt, ms] = both2(meanDistance), [at, as] = both2(angles), other = [[1, 2], [0, 2], [0, 1]]
    const corner = a => NAMES.map((_, j) => show(a[j][other[j][0]][other[j][1]]))
    const matrix = (f, m = f(e.student)) => table(NAMES.map(n => `i = ${n}`), NAMES.map((n, j) => [`j = ${n}`, ...m[j].map(vector)]))
    box.querySelector('.numbers').innerHTML =
      `<p class="values">RKD-D <output class="value-d">${show(D.value, 5)}</output> RKD-A <output class="value-a">${show(A.value, 5)}</output></p>` +
      table(['|AB|', '|AC|', '|BC|', both('mean', '平均') + ' μ', '|AB|/μ', '|AC|/μ', '|BC|/μ'], [[dt, mt], [ds, ms]].map(([d, m], w) =>
        [ways[w], ...PAIRS.map(([i, j]) => show(d[i][j])), show(m), ...PAIRS.map(([i, j]) => show(d[i][j] / m))])) +
      table(NAMES.map(n => both(`cosine at ${n}`, `${n}处的余弦`)), [at, as].map((a, w) => [ways[w], ...corner(a)])) +
      `<details${box.dataset.open ? ' open' : ''}><summary>${both("the student's", '学生的')} <code>td</code>, <code>norm_td</code>, ${both('gradients', '梯度')}</summary>
      <p><code>td[j, i]</code></p>${matrix(td)}<p><code>norm_td[j, i]</code></p>${matrix(normTd)}` +
      table(['RKD-D', 'RKD-A'], NAMES.map((n, k) => [both('gradient at', '梯度') + ' ' + n, ...[D, A].map(L => `(${L.gradient[k].map(x => show(x, 4)).join(', ')})`)])) + '</details>'
    box.querySelector('details').ontoggle = event => { box.dataset.open = event.target.open ? '1' : '' }
  }
  const stop = loop(box, () => {
    const [d, a] = weights(), D = rkdDistance(e.student, e.teacher).gradient, A = rkdAngle(e.student, e.teacher).gradient
    e.student.forEach((p, k) => { add(p, D[k], -d); add(p, A[k], -a) })
    draw()
  })
  box.querySelector('.again').onclick = () => { stop(); Object.assign(e, JSON.parse(JSON.stringify(begin))); draw() }
  const put = (who, k, x, y) => { e[who][k] = [x, y].map(v => Math.max(-3.4, Math.min(3.4, v))); draw() }
  box.querySelectorAll('svg').forEach(svg => {
    let held = null
    svg.onpointerdown = event => {
      const g = event.target.closest('[data-k]')
      if (g) { held = +g.dataset.k; svg.setPointerCapture(event.pointerId); stop(); event.preventDefault(); g.focus() }
    }
    svg.onpointermove = event => {
      if (held === null) return
      const r = svg.getBoundingClientRect(), scale = SIZE / r.width
      put(svg.dataset.who, held, ((event.clientX - r.left) * scale - SIZE / 2) / UNIT, (SIZE / 2 - (event.clientY - r.top) * scale) / UNIT)
    }
    svg.onpointerup = svg.onpointercancel = () => { held = null }
    svg.onkeydown = event => {
      const by = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key], g = event.target.closest('[data-k]')
      if (by && g) { const who = svg.dataset.who, p = e[who][+g.dataset.k]; event.preventDefault(); put(who, +g.dataset.k, p[0] + by[0], p[1] + by[1]) }
    }
  })
  draw()
}

function temperature(box) {
  const begin = { v: [6, 3, 0], z: [6, 0, 3] }, e = JSON.parse(JSON.stringify(begin))
  const slider = (who, c) => `<label>${c + 1} <input type="range" min="-8" max="8" step="0.1" data-who="${who}" data-c="${c}" aria-label="${who} ${c + 1}"><output></output></label>`
  box.innerHTML = `<div class="panels"><fieldset><legend>${both("teacher's logits", '教师的logits')}</legend>${[0, 1, 2].map(c => slider('v', c)).join('')}</fieldset>
    <fieldset><legend>${both("student's logits", '学生的logits')}</legend>${[0, 1, 2].map(c => slider('z', c)).join('')}</fieldset></div>
    <p class="controls"><label>${both('temperature', '温度')} T <input class="T" type="range" min="-1" max="5" step="0.02" value="2" aria-label="T"><output class="T"></output></label> ${BUTTONS}</p>
    <div class="numbers" aria-live="polite"></div>`
  const T = () => 2 ** box.querySelector('input.T').value
  function draw() {
    const now = T(), p = softmax(e.v, now), q = softmax(e.z, now), L = kd(e.z, e.v, now), bar = (x, kind) => `<i class="bar ${kind}" style="width:${(6 * x).toFixed(2)}em"></i> ${(100 * x).toFixed(1)} %`
    box.querySelectorAll('[data-who]').forEach(i => { i.value = e[i.dataset.who][i.dataset.c]; i.nextSibling.textContent = show(e[i.dataset.who][i.dataset.c], 1) })
    box.querySelector('output.T').textContent = show(now, 2)
    box.querySelector('.numbers').innerHTML = `<p class="values">KL <output>${show(L.value / now ** 2, 5)}</output> T² KL = KD <output class="value-kd">${show(L.value, 5)}</output></p>` +
      table([both('teacher p', '教师p'), both('student q', '学生q'), both('gradient', '梯度') + ' T (q − p)'], p.map((x, c) => [c + 1, bar(x, 't'), bar(q[c], 's'), show(L.gradient[c], 4)]))
  }
  const stop = loop(box, () => { add(e.z, kd(e.z, e.v, T()).gradient, -0.2); draw() })
  box.oninput = event => { const i = event.target; if (i.dataset.who) { stop(); e[i.dataset.who][i.dataset.c] = +i.value }; draw() }
  box.querySelector('.again').onclick = () => { stop(); Object.assign(e, JSON.parse(JSON.stringify(begin))); draw() }
  draw()
}
if (typeof document !== 'undefined') document.addEventListener('DOMContentLoaded', () => {
  document.querySelectorAll('.play-points').forEach(points)
  document.querySelectorAll('.play-temperature').forEach(temperature)
})
