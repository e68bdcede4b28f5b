// Renews the parts of a page every few seconds, and helps with forms. Without it everything can still be read and done.
(function () {
  "use strict";
  var main = document.querySelector("main[data-live]");
  var lost = document.querySelector(".lost");
  var paused = false;

  function renew(fresh) {
    fresh.querySelectorAll("[data-part]").forEach(function (part) {
      var shown = document.getElementById(part.id);
      // What somebody reads with the keyboard, or has selected, stays until they go on.
      if (!shown || shown.contains(document.activeElement) || selectedIn(shown) || shown.innerHTML === part.innerHTML) return;
      part.querySelectorAll("details[id]").forEach(function (details) {
        var before = document.getElementById(details.id);
        if (before) details.open = before.open;
      });
      var scrolled = Array.prototype.map.call(shown.querySelectorAll(".scroll"), function (e) { return [e.scrollLeft, e.scrollTop]; });
      shown.replaceChildren.apply(shown, Array.from(part.childNodes));
      shown.querySelectorAll(".scroll").forEach(function (e, i) {
        if (scrolled[i]) { e.scrollLeft = scrolled[i][0]; e.scrollTop = scrolled[i][1]; }
      });
    });
    var clock = fresh.querySelector("footer time"), own = document.querySelector("footer time");
    if (clock && own) { own.textContent = clock.textContent; own.dateTime = clock.dateTime; }
  }

  function selectedIn(element) {
    var selection = window.getSelection();
    return selection && !selection.isCollapsed && element.contains(selection.anchorNode);
  }

  function look() {
    if (paused || document.hidden) return;
    fetch(window.location.href, { headers: { "X-Fragment": "1", Accept: "text/html" }, credentials: "same-origin" })
      .then(function (answer) {
        if (answer.status === 401) { window.location.reload(); return null; }
        lost.hidden = answer.ok;
        return answer.ok ? answer.text() : null;
      })
      .then(function (text) { if (text !== null) renew(new DOMParser().parseFromString(text, "text/html")); })
      .catch(function () { lost.hidden = false; });
  }

  if (main) {
    var state = document.querySelector(".live-state"), button = document.getElementById("live-switch");
    state.hidden = false;
    button.addEventListener("click", function () {
      paused = !paused;
      button.setAttribute("aria-pressed", String(paused));
      button.textContent = paused ? "Updates are paused: go on" : "Pause updates";
      look();
    });
    window.setInterval(look, 1000 * Number(main.dataset.live));
  }

  var all = document.getElementById("choose-all");
  if (all) {
    all.parentElement.hidden = false;
    all.addEventListener("change", function () {
      document.querySelectorAll("input[name=id]").forEach(function (box) { box.checked = all.checked; });
    });
  }
  document.querySelectorAll("[data-confirm]").forEach(function (control) {
    control.addEventListener("click", function (event) {
      if (!window.confirm(control.dataset.confirm)) event.preventDefault();
    });
  });
})();
