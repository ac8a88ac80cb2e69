// The cost calculator: the formulas of cost.py, evaluated whenever a field changes.
"use strict";

(() => {
  const form = document.getElementById("calculator");
  if (form === null) return;
  const fields = form.elements;
  const BADGES = { measured: "measured here", published: "published", assumed: "assumed", own: "your own" };

  const cost = (machine, tokens, speed) => {
    const gpuHours = tokens / (3600 * speed);
    return {
      hours: gpuHours / machine.gpus,
      gpu_hours: gpuHours,
      usd: gpuHours * machine.price,
      kwh: (gpuHours * machine.watts) / 1000,
    };
  };
  const assumedSpeed = (flops, mfu, parameters) => (mfu * flops) / (6 * parameters);

  const heldBytes = (rule, parameters, share) =>
    2 * parameters * (2 + rule.inside * share + rule.outside * (1 - share));
  const devicesNeeded = (bytes, memory) => Math.ceil(bytes / (0.9 * memory));

  const amount = (value) => {
    const text = Number(value.toPrecision(3)).toLocaleString("en-US", { maximumFractionDigits: 4 });
    return text === "-0" ? "0" : text.replace("-", "−");
  };
  const signed = (value) => (value > 0 ? "+" : "") + amount(value);

  const chosen = (name) => fields[name].selectedOptions[0].dataset;
  const number = (name) => fields[name].valueAsNumber * Number(fields[name].dataset.scale);
  const put = (name, value, kind) => {
    fields[name].value = value;
    fields[name].setCustomValidity("");
    mark(name, kind);
  };
  const mark = (name, kind) => {
    const badge = form.querySelector(`[data-for="${name}"]`);
    badge.dataset.kind = kind;
    badge.textContent = BADGES[kind];
  };
  const cite = (name) => {
    form.querySelector(`[data-source="${name}"]`).textContent = chosen(name).note;
  };

  const assumeSpeed = () => {
    if (fields["speed-source"].value !== "assumed") return;
    if (!fields.mfu.validity.valid || !fields.parameters.validity.valid) return;
    const speed = assumedSpeed(Number(chosen("device").flops), number("mfu"), number("parameters"));
    if (Number.isFinite(speed) && speed > 0) put("speed", Number(speed.toPrecision(4)), "assumed");
  };

  // A speed that was measured on one device does not apply to another.
  const keepMeasuredSpeed = () => {
    for (const option of fields["speed-source"].options) {
      const { device } = option.dataset;
      if (device === undefined) continue;
      option.disabled = device !== fields.device.value;
      if (option.disabled && option.selected) fields["speed-source"].value = "assumed";
    }
  };

  // The fields that a choice fills in; the reader may change them.
  const choices = {
    device: ({ watts, price }) => {
      put("watts", watts, "published");
      put("price", price, "assumed");
      keepMeasuredSpeed();
    },
    model: ({ parameters, parametersKind, share, tokens, tokensKind }) => {
      put("parameters", parameters, parametersKind);
      put("share", share, parametersKind);
      put("tokens", tokens, tokensKind);
    },
    "speed-source": ({ speed, kind }) => {
      if (speed === undefined) mark("speed", kind);
      else put("speed", speed, kind);
    },
    candidate: ({ fraction, fractionKind, speedup, speedupKind }) => {
      if (fraction === undefined) return ["fraction", "speedup"].forEach((name) => mark(name, "own"));
      put("fraction", fraction, fractionKind);
      put("speedup", speedup, speedupKind);
    },
  };

  // Chromium silently drops a comma from a number: 1,5 becomes 15. After a comma, the field is
  // invalid until the reader types a decimal point or deletes digits.
  const noteComma = ({ target, data }) => {
    if (target.type !== "number" || !data?.includes(",")) return;
    target.dataset.before = data === "," ? target.value : data.slice(0, data.lastIndexOf(","));
    delete target.dataset.misread;
  };
  const checkComma = ({ target, data, inputType }) => {
    const { value, dataset } = target;
    const { before, misread } = dataset;
    if (before === undefined) return;
    const deleted = inputType?.startsWith("delete") || (misread !== undefined && value !== misread && value.length <= misread.length);
    const point = data?.includes(".") || (value.includes(".") && !(misread ?? before).includes("."));
    target.setCustomValidity(deleted || point || value === "" ? "" : "comma");
    if (deleted || point) delete dataset.before;
    else if (value !== "") dataset.misread ??= value;
  };

  const problemOf = (input) => {
    const { validity, min, max } = input;
    const label = form.querySelector(`label[for="${input.id}"]`).textContent;
    const unit = input.parentElement.querySelector(".unit").textContent;
    const said = `“${label}” is ${input.value}${unit && " " + unit}`;
    if (validity.valid) return "";
    if (validity.customError) return `“${label}” was given a comma; write 1.5 or 1000, not 1,5 or 1,000.`;
    if (validity.badInput || validity.valueMissing) return `“${label}” has no number; give one.`;
    if (validity.rangeOverflow) return `${said}; give at most ${Number(max).toLocaleString("en-US")}.`;
    if (validity.stepMismatch) return `${said}; give a whole number.`;
    if (min === "0") return `${said}; give 0 or more.`;
    return `${said}; give ${min === "1" ? "at least 1" : "a number above 0"}.`;
  };

  const showMemory = (valid) => {
    const device = chosen("device");
    const [parameters, share] = [number("parameters"), number("share")];
    const rows = [...form.querySelectorAll("tr[data-memory]")].map((row) => {
      const bytes = heldBytes({ inside: Number(row.dataset.inside), outside: Number(row.dataset.outside) }, parameters, share);
      return { row, bytes, devices: devicesNeeded(bytes, Number(device.memory)) };
    });
    const gib = (bytes) => amount(bytes / 2 ** 30);
    const whole = rows[0].bytes;
    for (const { row, bytes, devices } of rows) {
      const saved = bytes === whole && row === rows[0].row ? "–" : `${gib(whole - bytes)} (${amount(100 * (1 - bytes / whole))}\u00a0%)`;
      [gib(bytes), saved, devices.toLocaleString("en-US")].forEach((text, i) => {
        row.cells[i + 1].textContent = valid ? text : "–";
      });
    }
    const own = rows.find(({ row }) => row.dataset.memory === "SinkGD");
    form.querySelector('output[name="memory"]').textContent = valid
      ? `SinkGD holds ${gib(own.bytes)} GiB instead of AdamW’s ${gib(whole)} GiB and needs ` +
        `${own.devices.toLocaleString("en-US")} × ${device.title}` +
        (own.devices === rows[0].devices ? ", as AdamW does." : ` instead of ${rows[0].devices.toLocaleString("en-US")}.`)
      : "";
  };

  const show = () => {
    const inputs = [...form.querySelectorAll("input")];
    const problems = [];
    for (const input of inputs) {
      const problem = problemOf(input);
      input.setAttribute("aria-invalid", String(problem !== ""));
      if (problem) problems.push(problem);
      if (problem) input.closest(".field").dataset.problem = problem;
      else delete input.closest(".field").dataset.problem;
    }
    const valid = problems.length === 0;
    const alert = form.querySelector(".problem");
    alert.hidden = valid;
    alert.textContent = problems.join(" ");
    showMemory(valid);
    const machine = { gpus: number("gpus"), price: number("price"), watts: number("watts") };
    const [tokens, speed] = [number("tokens"), number("speed")];
    const name = chosen("candidate").name;
    const baseline = cost(machine, tokens, speed);
    const candidate = cost(machine, tokens * number("fraction"), speed * number("speedup"));
    for (const row of form.querySelectorAll("[data-outcome]")) {
      const key = row.dataset.outcome;
      const values = [baseline[key], candidate[key], candidate[key] - baseline[key]];
      row.querySelectorAll("td").forEach((cell, i) => {
        cell.dataset.value = valid ? values[i] : "";
        cell.textContent = valid ? (i === 2 ? signed : amount)(values[i]) : "–";
      });
    }
    const part = valid ? candidate.hours / baseline.hours : 1;
    form.querySelector(".bars").style.visibility = valid ? "" : "hidden";
    form.querySelector('[data-bar="baseline"]').style.setProperty("--part", Math.min(1, 1 / part));
    form.querySelector('[data-bar="candidate"]').style.setProperty("--part", Math.min(1, part));
    form.querySelector("th[data-name]").textContent = name;
    form.querySelector('output[name="cost"]').textContent = valid
      ? `${name} takes ${amount(candidate.hours)} h instead of ${amount(baseline.hours)} h, and ` +
        `${amount(candidate.usd)} USD instead of ${amount(baseline.usd)} USD.`
      : "";
  };

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("beforeinput", noteComma);
  form.addEventListener("input", checkComma);
  form.addEventListener("input", ({ target }) => {
    const { name } = target;
    if (name in choices) {
      choices[name](chosen(name));
    } else {
      mark(name, "own");
      if (name === "speed") fields["speed-source"].value = "own";
      if (name === "fraction" || name === "speedup") fields.candidate.value = "own";
    }
    assumeSpeed();
    ["model", "speed-source", "candidate"].forEach(cite);
    show();
  });
  show();
})();
