(function () {
  "use strict";
  var scheme = window.matchMedia("(prefers-color-scheme: dark)");
  var config = { responsive: true, displayModeBar: false };
  var themes = {
    light: { text: "#33383f", grid: "#e3e6ea", line: "#a9afb8", page: "#ffffff" },
    dark: { text: "#d4d8dd", grid: "#31363e", line: "#6d747e", page: "#1d2127" }
  };

  // Colours of text and grid as one flat update, for the first drawing and for a change of theme.
  function themed(layout, theme) {
    var update = {
      "font.color": theme.text,
      "hoverlabel.bgcolor": theme.page,
      "hoverlabel.font.color": theme.text
    };
    Object.keys(layout).filter(function (key) { return /^[xy]axis\d*$/.test(key); }).forEach(function (axis) {
      update[axis + ".gridcolor"] = theme.grid;
      update[axis + ".linecolor"] = theme.line;
      update[axis + ".tickcolor"] = theme.line;
    });
    return update;
  }

  function assign(target, path, value) {
    var keys = path.split(".");
    var last = keys.pop();
    keys.forEach(function (key) { target = target[key] = target[key] || {}; });
    target[last] = value;
  }

  function now() { return scheme.matches ? themes.dark : themes.light; }

  var plots = Array.prototype.slice.call(document.querySelectorAll(".plot"));

  // A folded figure has no width yet, so it is drawn when it is unfolded.
  function draw(plot) {
    if (plot.data || plot.closest("details:not([open])")) { return; }
    var spec = JSON.parse(document.getElementById(plot.id + "-data").textContent);
    var update = themed(spec.layout, now());
    Object.keys(update).forEach(function (path) { assign(spec.layout, path, update[path]); });
    Plotly.newPlot(plot, spec.data, spec.layout, config);
    restyle(plot);
  }

  // Hides the roles that are not selected above the small figures.
  function restyle(plot) {
    if (!plot.hasAttribute("data-small") || !plot.closest("#curves")) { return; }
    document.querySelectorAll("input[data-role]").forEach(function (box) {
      var mine = [];
      plot.data.forEach(function (trace, i) {
        if (trace.meta && trace.meta.role === box.dataset.role && (trace.visible !== false) !== box.checked) { mine.push(i); }
      });
      if (mine.length) { Plotly.restyle(plot, { visible: box.checked }, mine); }
    });
  }

  function drawn() { return plots.filter(function (plot) { return plot.data; }); }

  plots.forEach(draw);
  document.querySelectorAll("details").forEach(function (part) {
    part.addEventListener("toggle", function () { if (part.open) { part.querySelectorAll(".plot").forEach(draw); } });
  });

  function repaint(theme, size) {
    drawn().forEach(function (plot) {
      Plotly.relayout(plot, Object.assign(themed(plot.layout, theme), size(plot)));
    });
  }

  function fluid() { return { autosize: true, width: null }; }

  // The widths fit A4 and US letter with usual margins: figures do not receive the width of the paper.
  function printed(plot) { return { autosize: false, width: plot.hasAttribute("data-small") ? 330 : 680 }; }

  scheme.addEventListener("change", function () { repaint(now(), fluid); });

  // On paper the page is white and nothing can be unfolded.
  var unfolded = [];
  window.addEventListener("beforeprint", function () {
    unfolded = Array.prototype.slice.call(document.querySelectorAll("details:not([open])"));
    unfolded.forEach(function (part) { part.open = true; });
    plots.forEach(draw);
    repaint(themes.light, printed);
  });
  window.addEventListener("afterprint", function () {
    repaint(now(), fluid);
    unfolded.forEach(function (part) { part.open = false; });
  });

  Array.prototype.forEach.call(document.querySelectorAll("input[data-role]"), function (box) {
    box.addEventListener("change", function () { drawn().forEach(restyle); });
  });
})();
