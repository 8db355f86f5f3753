"""The templates of the pages, which escape every text: none of the data becomes markup."""

import jinja2


def page_template(name: str) -> jinja2.Template:
    """A template of this folder."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.PackageLoader("dpojax.evaluation", "."),
    )
    return environment.get_template(name)
