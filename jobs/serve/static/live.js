// Renews the parts of a page every few seconds, and helps with forms. Without it everything can still be read and done.
(function () {
  "use strict";
  var main = document.querySelector("main[data-live]");
  var lost = document.querySelector(".lost");
  var paused = false, asking = false;

  function renew(fresh) {
    // An answer that tells of trouble may have parts too; one that has none changes nothing.
    if (!fresh.querySelector("[data-part]")) return false;
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
      shown.hidden = part.hidden;
      shown.querySelectorAll(".scroll").forEach(function (e, i) {
        if (scrolled[i]) { e.scrollLeft = scrolled[i][0]; e.scrollTop = scrolled[i][1]; }
      });
    });
    var clock = fresh.querySelector("footer time"), own = document.querySelector("footer time");
    if (clock && own) { own.textContent = clock.textContent; own.dateTime = clock.dateTime; }
    return true;
  }

  function selectedIn(element) {
    var selection = window.getSelection();
    return selection && !selection.isCollapsed && element.contains(selection.anchorNode);
  }

  function say(words, renewed) {
    lost.textContent = words && words + (renewed ? "" : " What you see is from before.");
    lost.hidden = !words;
  }

  function look() {
    if (paused || asking || document.hidden) return;
    asking = true;
    fetch(window.location.href, { headers: { "X-Fragment": "1", Accept: "text/html" }, credentials: "same-origin", signal: AbortSignal.timeout(30000) })
      .then(function (answer) {
        if (answer.status === 401) window.location.reload();
        return answer.text().then(function (text) {
          var renewed = renew(new DOMParser().parseFromString(text, "text/html"));
          say(answer.ok ? "" : answer.status < 500 ? "This is not there any more." : "The server could not show all of this now.", renewed);
        });
      })
      .catch(function () { say("The server does not answer."); })
      .then(function () { asking = false; });
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
