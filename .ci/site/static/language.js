// Before anything is drawn: which language is shown. The address says it, else what was chosen before, else the browser.
'use strict'
{
  const KNOWN = ['zh', 'en', 'both']
  const kept = () => { try { return localStorage.getItem('relkd-language') } catch { return null } }
  const asked = new URLSearchParams(location.search).get('lang')
  const browser = (navigator.languages || [navigator.language]).some((l, k) => k === 0 && /^zh/i.test(l)) ? 'zh' : 'en'
  const root = document.documentElement
  window.showLanguage = to => {
    root.dataset.lang = to
    root.lang = to === 'zh' ? 'zh' : 'en'
    document.querySelectorAll('.languages button').forEach(b => b.setAttribute('aria-pressed', b.dataset.to === to))
    document.querySelectorAll('img[data-alt-en]').forEach(i => {
      const { altEn, altZh } = i.dataset
      i.alt = to === 'zh' ? altZh : to === 'en' || altEn === altZh ? altEn : `${altEn} · ${altZh}`
    })
  }
  window.chooseLanguage = to => {
    try { localStorage.setItem('relkd-language', to) } catch { /* a browser that keeps nothing */ }
    const at = new URL(location.href)
    at.searchParams.set('lang', to)
    try { history.replaceState(null, '', at) } catch { /* a folder without a server */ }
    window.showLanguage(to)
  }
  window.showLanguage([asked, kept(), browser].find(l => KNOWN.includes(l)))
  if (KNOWN.includes(asked)) try { localStorage.setItem('relkd-language', asked) } catch { /* as above */ }
}
