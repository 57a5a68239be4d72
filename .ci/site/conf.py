"""Sphinx's settings for the site; `make site` calls it with the folder that pages.py wrote."""
project = "relkd"
html_title = "relkd"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["figures/records"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
mathjax_path = "mathjax/tex-svg.js"
mathjax_options = {"defer": "defer"}
mathjax3_config = {"svg": {"fontCache": "global"}, "options": {"enableMenu": False}}
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js", "playground.js"]
html_copy_source = False
html_show_sourcelink = False
html_use_index = False
html_show_copyright = False
html_sidebars = {"**": ["sidebar/brand.html", "sidebar/scroll-start.html", "sidebar/navigation.html", "sidebar/scroll-end.html"]}
pygments_style = "a11y-high-contrast-light"                               # every token at least 4.5 : 1 on its ground
pygments_dark_style = "a11y-high-contrast-dark"


def setup(app):
    def start(app):
        app.builder.search = False                                        # pagefind makes the index, of both languages
    app.connect("builder-inited", start)
