// The OpenAPI description for people: no other site is asked for anything.
const description = await (await fetch("openapi.json")).json();
const add = (parent, name, text) => {
  const element = document.createElement(name);
  element.textContent = text;
  parent.append(element);
  return element;
};
const resolve = schema => schema?.$ref ? description.components.schemas[schema.$ref.split("/").at(-1)] : schema;
const paths = document.getElementById("paths");
paths.replaceChildren();
for (const [path, methods] of Object.entries(description.paths)) {
  for (const [method, one] of Object.entries(methods)) {
    add(paths, "h2", `${method.toUpperCase()} ${path}`);
    add(paths, "p", one.description ?? one.summary);
    for (const parameter of one.parameters ?? [])
      add(paths, "p", `?${parameter.name}= (${parameter.schema.type ?? ""}, default ${parameter.schema.default ?? "none"})`);
    const [kind, content] = Object.entries(one.requestBody?.content ?? {})[0] ?? [];
    const json = kind === "application/json";
    let example = `curl ${location.origin}${path}`;
    if (kind && !json) example += ` \\\n  -H 'Content-Type: ${kind}' --data-binary @piece.mid`;
    if (json) {
      const fields = resolve(content.schema).properties ?? {};
      const body = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.default ?? null]));
      example += ` \\\n  -H 'Content-Type: application/json' -d '${JSON.stringify(body)}'`;
    }
    add(paths, "pre", example);
  }
}
