// The language switch, copy buttons, and the search in the language that is shown.
'use strict'
document.addEventListener('DOMContentLoaded', () => {
  const page = document.documentElement, root = page.dataset.root || ''
  const two = (en, zh) => page.dataset.lang === 'zh' ? zh : page.dataset.lang === 'en' ? en : `${en} · ${zh}`
  document.querySelectorAll('.languages button').forEach(b => { b.onclick = () => window.chooseLanguage(b.dataset.to) })
  window.showLanguage(page.dataset.lang)

  // a link keeps the language that stands in the address
  document.addEventListener('click', event => {
    const a = event.target.closest('a[href]'), lang = new URLSearchParams(location.search).get('lang')
    if (!a || !lang || a.hasAttribute('download') || !/\.html$/.test(a.pathname) || a.host !== location.host || a.pathname === location.pathname) return
    const to = new URL(a.href)
    to.searchParams.set('lang', lang)
    a.href = to
  })

  const ICON = '<svg viewBox="0 0 16 16" width="14" height="14" aria-hidden="true"><path d="M5 5V2h9v9h-3M2 5h9v9H2z" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
  // copy buttons: what a reader wrote, without the prompts
  document.querySelectorAll('div.highlight').forEach(box => {
    if (box.closest('.cell_output')) return
    const button = document.createElement('button')
    button.className = 'copy'
    button.innerHTML = ICON
    button.title = 'copy · 复制'
    button.setAttribute('aria-label', 'copy · 复制')
    button.onclick = async () => {
      const text = box.querySelector('pre').textContent
      try { await navigator.clipboard.writeText(text) } catch {
        const area = Object.assign(document.body.appendChild(document.createElement('textarea')), { value: text })
        area.select()
        document.execCommand('copy')
        area.remove()
      }
      button.textContent = 'ok'
      setTimeout(() => { button.innerHTML = ICON }, 1200)
    }
    box.append(button)
  })

  // what is wider than its place can be reached, and moved, with the keyboard
  const reachable = () => document.querySelectorAll('article pre, article mjx-container, article .output, article .table-wrapper, article .math-wrapper').forEach(e => {
    if (e.scrollWidth > e.clientWidth + 1 && e.clientWidth) e.tabIndex = 0
  })
  addEventListener('load', () => window.MathJax && MathJax.startup ? MathJax.startup.promise.then(reachable) : reachable())
  addEventListener('resize', reachable)

  // search
  const box = document.createElement('dialog')
  box.className = 'search'
  box.innerHTML = '<form method="dialog"><input type="search" autocomplete="off" aria-label="search · 搜索"><button aria-label="close · 关闭">×</button></form><div class="hits" aria-live="polite"></div>'
  document.body.append(box)
  const input = box.querySelector('input'), hits = box.querySelector('.hits')
  const shown = () => page.dataset.lang === 'zh' ? 'zh' : 'en'
  const clean = s => s.replace(/[&<>]/g, c => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;' }[c]))
  let engine = null, of = null
  async function start(lang) {
    if (of === lang) return engine
    engine = null
    if (location.protocol !== 'file:') {
      try {
        const found = await import(new URL(`${root}pagefind/pagefind.js`, location.href))
        if (of) await found.destroy()
        const kept = page.lang
        page.lang = lang
        await found.init()
        page.lang = kept
        engine = async words => (await Promise.all((await found.search(words)).results.slice(0, 20).map(r => r.data())))
          .map(r => [(r.raw_url || r.url).replace(/^\//, '').replace(/\?.*/, ''), r.meta.title, r.excerpt])
      } catch { engine = null }
    }
    if (!engine) engine = await byWords(lang)
    of = lang
    return engine
  }
  async function byWords(lang) {       // a folder without a server: the words are looked for as they are
    await new Promise((done, failed) => document.head.append(Object.assign(document.createElement('script'), { src: `${root}_static/words-${lang}.js`, onload: done, onerror: failed })))
    const pages = window.WORDS
    return words => {
      const asked = words.toLowerCase().split(/\s+/).filter(Boolean)
      return pages.map(([url, title, text]) => [url, title, text, asked.map(w => `${title} ${text}`.toLowerCase().split(w).length - 1), asked.filter(w => title.toLowerCase().includes(w)).length])
        .filter(p => p[3].every(Boolean)).sort((a, b) => b[4] - a[4] || Math.min(...b[3]) - Math.min(...a[3])).slice(0, 20)
        .map(([url, title, text]) => {
          const at = Math.max(0, text.toLowerCase().indexOf(asked[0])), from = Math.max(0, at - 60)
          return [url, title, `${clean(text.slice(from, at))}<mark>${clean(text.slice(at, at + asked[0].length))}</mark>${clean(text.slice(at + asked[0].length, at + 120))}`]
        })
    }
  }
  let turn = 0, asking = Promise.resolve()     // one search at a time: another language ends the engine of the one before
  async function look() {
    const mine = ++turn, words = input.value.trim()
    if (!words) { hits.innerHTML = ''; return }
    asking = asking.catch(() => {}).then(async () => mine === turn && (await start(shown()))(words))
    const found = await asking
    if (mine !== turn) return
    hits.innerHTML = found.length ? found.map(([url, title, text]) => `<a href="${root}${url}?lang=${page.dataset.lang}"><b>${clean(title)}</b><span>${text}</span></a>`).join('')
      : `<p>${two('Nothing found.', '没有找到。')}</p>`
  }
  input.oninput = look
  const open = () => { input.placeholder = two('search', '搜索'); box.showModal(); input.focus(); look() }
  document.querySelectorAll('.find').forEach(b => { b.onclick = open })
  document.addEventListener('keydown', event => {
    if (event.key === '/' && !box.open && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) { event.preventDefault(); open() }
  })
  box.onclick = event => { if (event.target === box) box.close() }
})
