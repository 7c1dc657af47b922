// A click on a heading sorts its table; a second click reverses the order. Rows without a value come last.
(function () {
  "use strict";
  function value(row, column) {
    var cell = row.cells[column];
    if (!cell.hasAttribute("data-value")) { return cell.textContent.trim().toLowerCase(); }
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  }
  document.querySelectorAll("table.board").forEach(function (table) {
    var headings = Array.prototype.slice.call(table.querySelectorAll("thead th"));
    headings.forEach(function (heading, column) {
      heading.querySelector("button").addEventListener("click", function () {
        var down = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach(function (each) { each.removeAttribute("aria-sort"); });
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        var body = table.tBodies[0];
        Array.prototype.slice.call(body.rows).sort(function (a, b) {
          var x = value(a, column), y = value(b, column);
          if (x === null || y === null) { return (x === null) - (y === null); }
          return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
        }).forEach(function (row) { body.appendChild(row); });
      });
    });
  });
})();
