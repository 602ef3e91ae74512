"""The page "Curvature" as its reader has it: what is seen, and what can be done."""

import urllib.parse

from patience import PATIENCE
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait


class Page:
    """What a reader sees, and does."""

    def __init__(self, browser):
        self.browser = browser

    def open(self, url, state="ready", framed=False, **chosen):
        """Opens the page by itself, or in the frame that TensorBoard has for it."""
        self.leave()
        query = {f"p.curvature.{key}": value for key, value in chosen.items()}
        if framed:
            query = "?" + urllib.parse.urlencode(query) if query else ""
            self.browser.get(f"{url}{query}#curvature")
            self.enter()
        else:
            query = urllib.parse.urlencode({"name": "curvature", **query})
            self.browser.get(f"{url}data/plugin_entry.html?{query}")
            self.until(lambda: self.all("#page"))
        self.until(lambda: self.one("#page").get_attribute("data-state") == state)
        if state == "ready":
            self.settle()
        return self

    def leave(self):
        """Leaves the page, which has caused no error."""
        self.browser.switch_to.default_content()
        self.browser.get("about:blank")
        log = self.browser.get_log("browser")
        severe = [entry for entry in log if entry["level"] == "SEVERE"]
        # A page by itself has no icon.
        assert [e for e in severe if "favicon.ico" not in e["message"]] == []

    def settle(self):
        """Waits until nothing more is being read."""
        self.until(lambda: self.all(".content[aria-busy=false]"))

    def enter(self):
        frame = self.until(lambda: self.all("iframe[src*='name=curvature']"))[0]
        self.browser.switch_to.frame(frame)
        self.until(lambda: self.all("#page"))

    def until(self, condition):
        wait = WebDriverWait(
            self.browser, PATIENCE, 0.1, [StaleElementReferenceException]
        )
        return wait.until(lambda _: condition())

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return self.each(selector, "(node.innerText ?? node.textContent).trim()")

    def each(self, selector, script):
        """What a script gives of each node, all at once."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((node) => "
            f"{script})",
            selector,
        )

    def text(self, selector):
        # Steps are grouped by thin spaces.
        return self.one(selector).text.replace("\u2009", "")

    @property
    def chosen(self):
        """What the address that the reader sees says of the choices."""
        query = self.browser.execute_script("return window.parent.location.search")
        return {
            key.removeprefix("p.curvature."): value
            for key, value in urllib.parse.parse_qsl(query.removeprefix("?"))
            if key.startswith("p.curvature.")
        }

    def drag(self, chart, first, last):
        """Over a curve, between two places given as shares of the plot."""
        plot = self.one(f"[data-chart={chart}] .plot")
        self.browser.execute_script("arguments[0].scrollIntoView()", plot)
        width = plot.rect["width"]
        actions = ActionChains(self.browser)
        actions.move_to_element_with_offset(plot, round((first - 0.5) * width), 0)
        actions.click_and_hold()
        actions.move_by_offset(round((last - first) * width), 0).release().perform()

    def lines_of(self, chart, expected):
        """Waits for the curves of figures that are read when they are asked for."""
        self.until(lambda: self.lines(chart) == expected)

    def lines(self, chart):
        found = self.each(
            f"[data-chart={chart}] path.line", "[node.dataset.run, node.dataset.name]"
        )
        return [tuple(pair) for pair in found]
